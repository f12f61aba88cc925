"""A server that forks the ranks of a group, each with an environment and words of its own: what they import is there.

`python rank_server.py` reads a JSON list of [environment, words] a line and answers with a list of [exit status, what
it printed]. A rank with DIE_AT=N ends without a word in place of its step N, from 0.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kills
from commands import environment

Ended = tuple[int, str]


class Server:
    """The other end."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def ask(self, ranks: list[tuple[Mapping[str, str], list[str]]]) -> list[Ended]:
        """Run the ranks; how each ended, when all have."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps(ranks), file=self.process.stdin, flush=True)
        return [(status, text) for status, text in json.loads(self.process.stdout.readline())]


@contextmanager
def serving() -> Iterator[Server]:
    """A server that has imported everything."""
    command = [sys.executable, __file__]
    with subprocess.Popen(
        command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout and process.stdout.readline() == "ready\n"
            yield Server(process)
        finally:
            process.kill()


def become(variables: Mapping[str, str], words: list[str], output: int) -> int:
    """Be a rank; its exit code."""
    from tongkuan.cli.exits import run
    from tongkuan.learn.step import TrainStep

    os.environ.update(variables)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    take = TrainStep.take

    def last_words(self: TrainStep, step: int, loaded: Any) -> Any:
        if str(step) == os.environ.get("DIE_AT"):
            os._exit(9)
        return take(self, step, loaded)

    TrainStep.take = last_words  # type: ignore[method-assign]
    sys.argv = ["tongkuan", *words]
    return run()


def serve() -> None:
    """Answer on standard output."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    kills.import_all()
    print("ready", file=answers)
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            children = {}
            for number, (variables, words) in enumerate(json.loads(line)):
                path = Path(folder) / str(number)
                output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                if not (child := os.fork()):
                    code = 1
                    try:
                        code = become(variables, words, output)
                    except SystemExit as end:
                        code = int(str(end.code or 0))
                    finally:
                        sys.stdout.flush()
                        sys.stderr.flush()
                        os._exit(code)
                os.close(output)
                children[child] = path
            ended = []
            for child, path in children.items():
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                ended.append((status, path.read_text(encoding="utf-8")))
            print(json.dumps(ended), file=answers)


if __name__ == "__main__":
    serve()
