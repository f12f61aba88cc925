"""The verbs: `./entrypoint.sh VERB [--option value] [section.key=value]`; without a verb, what there is."""

import argparse
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tongkuan.files import NO_ROOM, FaultError, UserError

DATA_SCRIPTS = Path(__file__).resolve().parents[2] / "data_scripts"
PRESET = "ccks2022-63"
MODEL = Path("weights/model.safetensors")

Arguments = argparse.Namespace


class Parser(argparse.ArgumentParser):
    """Errors of usage in one line, with the nearest known option."""

    def error(self, message: str) -> Any:
        known = [option for action in self._actions for option in action.option_strings]
        for word in message.split():
            if word.startswith("--") and (near := difflib.get_close_matches(word.partition("=")[0], known, n=1)):
                message += f" (did you mean {near[0]}?)"
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


def add_model_options(parser: argparse.ArgumentParser, split: str) -> None:
    """Options of the verbs that run a trained model."""
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="item files and images/")
    parser.add_argument("--split", default=split, help=f"which item files (default {split})")
    parser.add_argument("--model", type=Path, default=MODEL, metavar="FILE", help=f"default {MODEL}")
    parser.add_argument("--threshold", type=float, help="instead of the model's own")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default fp32")
    parser.add_argument("--encode-batch", type=int, metavar="N", help="items a batch (default: by device and picture)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep embeddings: a killed run goes on from them")
    add_nproc(parser)


def add_nproc(parser: argparse.ArgumentParser) -> None:
    """Ranks; every GPU by itself."""
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks (default: one a GPU, one without)")


def add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default=PRESET, help=f"a name or a YAML file (default {PRESET})")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="what split made")
    parser.add_argument("--run", type=Path, metavar="DIR", help="checkpoints and curves (default runs/PRESET)")
    parser.add_argument("--model", type=Path, default=MODEL, metavar="FILE", help=f"the best one (default {MODEL})")
    add_nproc(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as train.steps=500")


def run_train(arguments: Arguments) -> None:
    from tongkuan.config import load_settings
    from tongkuan.train import train

    run_dir = arguments.run or Path("runs") / Path(arguments.preset).stem
    train(load_settings(arguments.preset, arguments.overrides), arguments.data, run_dir, arguments.model)


def add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="FILE", help="a released .pth, whole or in parts, to import")
    parser.add_argument("--preset", default=PRESET, help=f"its recipe, or whose encoders to fetch (default {PRESET})")
    parser.add_argument("--text-encoder", type=Path, metavar="DIR", help="config.json and vocab.txt of its texts")
    parser.add_argument("--threshold", type=float, default=0.0, metavar="T", help="of the imported model (default 0)")
    parser.add_argument("--out", type=Path, default=MODEL, metavar="FILE", help=f"the imported model (default {MODEL})")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as model.image.size=224")


def run_weights(arguments: Arguments) -> None:
    from tongkuan.release import fetch_encoders, import_release

    preset, overrides = arguments.preset, arguments.overrides
    if arguments.model is None:
        fetch_encoders(preset, overrides)
        return
    import_release(arguments.model, arguments.out, preset, overrides, arguments.text_encoder, arguments.threshold)


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, "valid")


def run_evaluate(arguments: Arguments) -> None:
    from tongkuan.config import DataSettings
    from tongkuan.evaluate import evaluate

    settings = DataSettings(encode_batch=arguments.encode_batch)
    evaluate(
        arguments.data,
        arguments.split,
        arguments.model,
        settings,
        arguments.precision,
        arguments.threshold,
        arguments.cache,
    )


def add_predict(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, "test")
    add_submit(parser)


def run_predict(arguments: Arguments) -> None:
    from tongkuan.config import DataSettings
    from tongkuan.predict import predict

    settings = DataSettings(encode_batch=arguments.encode_batch)
    predict(
        arguments.data,
        arguments.split,
        arguments.model,
        arguments.submit,
        settings,
        arguments.precision,
        arguments.threshold,
        arguments.cache,
    )


def add_verify(parser: argparse.ArgumentParser) -> None:
    add_submit(parser)
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="item files and images/")
    parser.add_argument("--model", type=Path, default=MODEL, metavar="FILE", help=f"default {MODEL}")


def run_verify(arguments: Arguments) -> None:
    from tongkuan.verify import verify

    verify(arguments.submit, arguments.data, arguments.model)


def add_submit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--submit", type=Path, default=Path("submit"), metavar="DIR", help="default submit")


def add_judge(parser: argparse.ArgumentParser) -> None:
    add_submit(parser)
    parser.add_argument("--pairs", type=Path, required=True, metavar="FILE", help="the pairs that were predicted")


def run_check(arguments: Arguments) -> None:
    from tongkuan.judge import check

    check(arguments.submit, arguments.pairs)


def run_score(arguments: Arguments) -> None:
    from tongkuan.judge import score

    score(arguments.submit, arguments.pairs)


def add_plot(parser: argparse.ArgumentParser) -> None:
    add_judge(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help=".svg or .png (default SUBMIT/scores.svg)")


def run_plot(arguments: Arguments) -> None:
    from tongkuan.plot import plot

    plot(arguments.submit, arguments.pairs, arguments.out or arguments.submit / "scores.svg")


def add_report(parser: argparse.ArgumentParser) -> None:
    add_judge(parser)
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="item files and images/")
    parser.add_argument("--run", type=Path, metavar="DIR", help="a training run: adds its curves")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another result of these pairs to compare with")
    parser.add_argument("--out", type=Path, metavar="FILE", help=".html (default SUBMIT/report.html)")


def run_report(arguments: Arguments) -> None:
    from tongkuan.report import report

    out = arguments.out or arguments.submit / "report.html"
    report(arguments.submit, arguments.pairs, arguments.data, out, arguments.run, arguments.against)


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), metavar="DIR", help="default runs/demo")
    parser.add_argument("--ablation", action="store_true", help="also train on text alone and on pictures alone")
    add_nproc(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as train.steps=500")


def run_demo(arguments: Arguments) -> None:
    from tongkuan.demo import demo

    demo(arguments.run, arguments.overrides, arguments.ablation, arguments.nproc, main)


Verb = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[Arguments], None]]
VERBS: dict[str, Verb] = {
    "weights": ("import a released checkpoint, or fetch a preset's encoders ahead", add_weights, run_weights),
    "train": ("train a model; the same command resumes", add_train, run_train),
    "evaluate": ("precision, recall and F1 of a model on labelled pairs", add_evaluate, run_evaluate),
    "predict": ("write submit/result.jsonl", add_predict, run_predict),
    "verify": ("predict again from manifest.json and compare to the byte", add_verify, run_verify),
    "check": ("hold a result against the judges' contract", add_judge, run_check),
    "score": ("the judges' F1 of a result", add_judge, run_score),
    "plot": ("draw the scores of same and different pairs of a result", add_plot, run_plot),
    "report": ("one page of a result: figures, curves, a slider, pairs with pictures", add_report, run_report),
    "demo": ("the whole job on a sample catalogue, in minutes", add_demo, run_demo),
}
SCRIPTS = {
    "download": "fetch the organiser's files, or take them from a folder",
    "sample": "draw the sample catalogue",
    "resize": "raw files -> checked items and 384 x 384 pictures",
    "split": "item-disjoint train and validation pairs",
    "attributes": "which attribute keys items have, and how well they tell products apart",
}
RANKED = ("train", "evaluate", "predict")


def usage() -> str:
    """What there is, a line a verb."""
    lines = [f"  {name:<12}{text}" for name, text in SCRIPTS.items()]
    lines += [f"  {name:<12}{verb[0]}" for name, verb in VERBS.items()]
    lines.append(f"  {'test':<12}the test suite")
    return "\n".join(
        [
            "Tongkuan: do two shop listings sell the same product?",
            "",
            "./entrypoint.sh VERB [--option value] [section.key=value]",
            "",
            *lines,
            "",
            "Start with ./entrypoint.sh demo; each verb answers --help.",
        ]
    )


def main(argv: Sequence[str]) -> int:
    """Run one verb; exit code 0, or an exception."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *rest = argv
    if name in SCRIPTS:
        sys.path.insert(0, str(DATA_SCRIPTS))
        return int(importlib.import_module(name).main(rest))
    if name not in VERBS:
        near = difflib.get_close_matches(name, [*VERBS, *SCRIPTS, "test"], n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"no verb {name!r}{hint}; run ./entrypoint.sh to see what there is")
    description, add_options, run = VERBS[name]
    parser = Parser(prog=f"./entrypoint.sh {name}", description=description, allow_abbrev=False)
    add_options(parser)
    arguments = parser.parse_intermixed_args(rest)
    if name in RANKED and (count := num_ranks(arguments.nproc)) > 1:
        from tongkuan.distributed import launch

        return launch(count, argv)
    run(arguments)
    return 0


def num_ranks(asked: int | None) -> int:
    """How many ranks to start from here: 1 within a rank, else as asked, else one a GPU."""
    from tongkuan.distributed import is_launched

    if is_launched():
        return 1
    if asked is not None:
        return asked
    import torch

    return torch.cuda.device_count()


def stop(number: int, _frame: object) -> None:
    """A request to end (as `docker stop` makes) ends like Ctrl-C: temporary files go, then exit 143."""
    sys.exit(128 + number)


def run() -> int:
    """main, with exceptions turned into exit codes: 2 for the user's errors, 1 for ours, 130 and 143 on signals."""
    signal.signal(signal.SIGTERM, stop)
    try:
        return main(sys.argv[1:])
    except (UserError, FaultError) as error:
        # Every rank meets the same error; one says so.
        if os.environ.get("RANK", "0") == "0":
            print(f"tongkuan: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        advice = "files that were there before are whole; make room and run the same command again"
        print(f"tongkuan: {error.filename or 'no more room'}: {error.strerror}; {advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tongkuan: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run())
