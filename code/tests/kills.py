"""A server that forks a process for each verb that it is told to run: what they import is there already.

`python kills.py` reads a JSON list of words a line and answers with the process id, then with its exit status. Each is
the leader of a session, so that all it started can be killed with it.
"""

import contextlib
import importlib
import json
import os
import sys

# All that verbs import on their way; modules that start threads must not be among them: they would not be forked.
MODULES = (
    *("tongkuan.cli.exits", "tongkuan.learn.train", "tongkuan.result.predict"),
    *("torch._dynamo", "torch._subclasses.fake_tensor"),
    *("torch.utils.tensorboard", "timm", "timm.models.convnext", "transformers.models.bert.modeling_bert"),
    *("data_scripts.download", "data_scripts.resize", "PIL.PngImagePlugin", "PIL.JpegImagePlugin", "httpx2"),
    *("tongkuan.match.groups", "tongkuan.report.views"),  # without pyarrow, which starts a thread
)


def import_all() -> None:
    """All of MODULES, without a thread."""
    for name in MODULES:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"  # noqa: PTH208


def serve() -> None:
    """Answer on the descriptor that was standard output; verbs print into nothing."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    import_all()
    from tongkuan.cli.exits import run

    print("ready", file=answers)
    for line in sys.stdin:
        if not (child := os.fork()):
            with contextlib.suppress(PermissionError):
                os.setsid()
            os.dup2(nowhere, 0)
            sys.argv = ["tongkuan", *json.loads(line)]
            code = 1
            try:
                code = run()
            except SystemExit as error:
                code = int(str(error.code or 0))
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(child, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers)


if __name__ == "__main__":
    serve()
