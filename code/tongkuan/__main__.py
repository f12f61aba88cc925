"""The verbs: `./entrypoint.sh VERB [--option value] [section.key=value]`; without a verb, what there is."""

import argparse
import importlib
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tongkuan.base.errors import UserError, clip, entrypoint, nearest
from tongkuan.base.files import check_apart_from_data
from tongkuan.base.terminal import close_streams, open_streams, say
from tongkuan.cli import options
from tongkuan.cli.command import Parser
from tongkuan.cli.exits import report_error, stop
from tongkuan.ranks.place import alone, awaited, find_place, forget, is_own_rank

FEW_RANKS = 16  # so many may be asked for on any machine without GPUs

Arguments = argparse.Namespace


def run_settings(arguments: Arguments) -> None:
    from tongkuan.settings import describe, resolve

    print(describe(resolve(arguments.preset, arguments.overrides)))
    print(f"# next: {entrypoint('train', '--preset', arguments.preset)}")


def run_train(arguments: Arguments) -> None:
    from tongkuan.settings import load_settings

    run_dir = arguments.run or Path("runs") / Path(arguments.preset).stem
    settings = load_settings(arguments.preset, arguments.overrides)
    if arguments.dry_run:
        from tongkuan.dryrun import dry_run_training

        dry_run_training(settings, arguments.data, run_dir)
        return
    from tongkuan.learn.train import train

    train(settings, arguments.data, run_dir, arguments.model)


def run_weights(arguments: Arguments) -> None:
    from tongkuan.model.released import fetch_encoders, import_release

    preset, overrides = arguments.preset, arguments.overrides
    if arguments.model is None:
        fetch_encoders(preset, overrides)
        return
    import_release(arguments.model, arguments.out, preset, overrides, arguments.text_encoder, arguments.threshold)


def run_evaluate(arguments: Arguments) -> None:
    from tongkuan.result.evaluate import evaluate

    evaluate(
        arguments.data,
        arguments.split,
        arguments.model,
        arguments.encode_batch,
        arguments.precision,
        arguments.threshold,
        arguments.cache,
    )


def run_predict(arguments: Arguments) -> None:
    from tongkuan.result.predict import predict

    if arguments.dry_run:
        from tongkuan.dryrun import dry_run_prediction

        dry_run_prediction(
            arguments.data, arguments.split, arguments.model, arguments.encode_batch, arguments.precision
        )
        return
    predict(
        arguments.data,
        arguments.split,
        arguments.model,
        arguments.submit,
        arguments.encode_batch,
        arguments.precision,
        arguments.threshold,
        arguments.cache,
    )


def run_verify(arguments: Arguments) -> None:
    from tongkuan.result.verify import verify

    verify(arguments.submit, arguments.data, arguments.model)


def run_check(arguments: Arguments) -> None:
    from tongkuan.judge.check import check

    check(arguments.submit, arguments.pairs)


def run_score(arguments: Arguments) -> None:
    from tongkuan.judge.check import score

    score(arguments.submit, arguments.pairs)


def run_plot(arguments: Arguments) -> None:
    from tongkuan.report.plot import plot

    plot(arguments.submit, arguments.pairs, arguments.out or arguments.submit / "scores.svg")


def run_report(arguments: Arguments) -> None:
    from tongkuan.report.report import report

    out = arguments.out or arguments.submit / "report.html"
    report(arguments.submit, arguments.pairs, arguments.data, out, arguments.run, arguments.against)


def run_explain(arguments: Arguments) -> None:
    from tongkuan.report.explain import explain

    explain(
        arguments.pair,
        arguments.data,
        arguments.split,
        arguments.model,
        arguments.out,
        arguments.threshold,
        arguments.precision,
        arguments.grid,
    )


def run_demo(arguments: Arguments) -> None:
    from tongkuan.demo import demo

    if arguments.nproc is not None:
        num_ranks(arguments.nproc)  # refused now rather than by a step of it
    demo(arguments.run, arguments.overrides, arguments.ablation, arguments.nproc, arguments.products, main)


@dataclass(frozen=True)
class Verb:
    """One verb of the package."""

    about: str
    example: str
    """What `./entrypoint.sh` is followed by, once the demo has run."""
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Arguments], None]


DEMO_DATA, DEMO_MODEL, SUBMITTED = (
    "--data runs/demo/data",
    "--model runs/demo/weights/model.safetensors",
    "--submit runs/demo/submit",
)
PAIRS, ANSWERS = "--pairs runs/demo/data/item_test_pair.jsonl", "--pairs runs/demo/data/item_test_answers.jsonl"
VERBS = {
    "settings": Verb(
        "all settings of a preset, and where each value comes from",
        "settings --preset demo train.steps=500",
        options.add_settings,
        run_settings,
    ),
    "weights": Verb(
        "import a released checkpoint, or fetch a preset's encoders ahead",
        "weights --preset small",
        options.add_weights,
        run_weights,
    ),
    "train": Verb(
        "train a model; the same command resumes",
        f"train --preset demo {DEMO_DATA} --run runs/mine --model runs/mine/model.safetensors train.steps=200",
        options.add_train,
        run_train,
    ),
    "evaluate": Verb(
        "precision, recall and F1 of a model on labelled pairs",
        f"evaluate {DEMO_DATA} {DEMO_MODEL}",
        options.add_evaluate,
        run_evaluate,
    ),
    "predict": Verb(
        "write submit/result.jsonl",
        f"predict {DEMO_DATA} {DEMO_MODEL} --submit runs/mine/submit",
        options.add_predict,
        run_predict,
    ),
    "verify": Verb(
        "predict again from manifest.json and compare to the byte",
        f"verify {DEMO_DATA} {DEMO_MODEL} {SUBMITTED}",
        options.add_verify,
        run_verify,
    ),
    "check": Verb(
        "hold a result against the judges' contract", f"check {SUBMITTED} {PAIRS}", options.add_judge, run_check
    ),
    "score": Verb("the judges' F1 of a result", f"score {SUBMITTED} {ANSWERS}", options.add_judge, run_score),
    "plot": Verb(
        "draw the scores of same and different pairs of a result",
        f"plot {SUBMITTED} {ANSWERS}",
        options.add_plot,
        run_plot,
    ),
    "report": Verb(
        "one page of a result: figures, curves, a slider, pairs with pictures",
        f"report {SUBMITTED} {ANSWERS} {DEMO_DATA} --run runs/demo/train",
        options.add_report,
        run_report,
    ),
    "explain": Verb(
        "one page of a pair: what its verdict rests on, by taking parts away",
        f"explain {DEMO_DATA} {DEMO_MODEL} --out runs/mine/explain.html",
        options.add_explain,
        run_explain,
    ),
    "demo": Verb(
        "the whole job on a sample catalogue, in minutes",
        "demo --run runs/quick --products 60 train.steps=100",
        options.add_demo,
        run_demo,
    ),
}
SCRIPTS = {
    "download": "fetch the organiser's files, or take them from a folder",
    "sample": "draw the sample catalogue",
    "resize": "raw files -> checked items and 384 x 384 pictures",
    "split": "item-disjoint train and validation pairs",
    "attributes": "which attribute keys items have, and how well they tell products apart",
}
OUTPUTS = {  # of verbs that read --data: options that name a folder to fill, and a file to write
    "train": (("run",), ("model",)),
    "predict": (("submit", "cache"), ()),
    "evaluate": (("cache",), ()),
    "report": ((), ("out",)),
    "explain": ((), ("out",)),
}
RANKED = ("train", "evaluate", "predict")


def usage() -> str:
    """What there is, a line a verb."""
    lines = [f"  {name:<12}{text}" for name, text in SCRIPTS.items()]
    lines += [f"  {name:<12}{verb.about}" for name, verb in VERBS.items()]
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


def script(name: str) -> ModuleType:
    """One of data_scripts/, by its verb."""
    return importlib.import_module(f"data_scripts.{name}")


def parser_of(name: str) -> Parser:
    """The options of a verb. UserError when there is no such verb."""
    if name in SCRIPTS:
        found: Parser = script(name).parser()
        return found
    if name not in VERBS:
        hint = nearest(name, [*VERBS, *SCRIPTS, "test"])
        raise UserError(f"no verb {clip(name)}{hint}; run ./entrypoint.sh to see what there is")
    verb = VERBS[name]
    parser = Parser(name, verb.about, f"./entrypoint.sh {verb.example}")
    verb.add_options(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run one verb; exit code 0, or an exception."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *rest = argv
    if name not in RANKED:
        forget()
    if name in SCRIPTS:
        return int(script(name).main(rest))
    parser = parser_of(name)
    arguments = parser.parse_intermixed_args(rest)
    folders, files = OUTPUTS.get(name, ((), ()))
    if folders or files:
        given = {option: path for option, path in vars(arguments).items() if path is not None}
        check_apart_from_data(arguments.data, *([given[o] for o in kind if o in given] for kind in (folders, files)))
    if name in RANKED and (count := num_ranks(arguments.nproc)) > 1:
        from tongkuan.ranks.launch import launch

        return launch(count, argv)
    VERBS[name].run(arguments)
    return 0


def num_ranks(asked: int | None) -> int:
    """How many ranks to start from here: 1 as a rank of a group, else as asked, else one a GPU.

    Raises UserError when the machine has too few GPUs, or when the environment names a group and the user a number.
    """
    if is_own_rank():
        return 1
    place = find_place()
    if place.world_size > 1:
        if asked is not None:
            group = f"the environment's WORLD_SIZE={place.world_size} would join ranks that others start"
            raise UserError(f"--nproc {asked} starts ranks of its own, {group}; leave out --nproc, or {alone()}")
        if place.local_rank == 0:
            say(f"tongkuan: {awaited(place)}")
        return 1
    if asked == 1 or (asked is None and place.has_launcher):
        return 1
    import torch

    from tongkuan.base.machine import available_cores

    gpus = torch.cuda.device_count()
    if asked is None:
        return gpus
    most = gpus or max(FEW_RANKS, available_cores())
    if asked > most:
        reason = f"{gpus} to be seen, and a rank takes one" if gpus else "without a GPU"
        raise UserError(f"--nproc {asked}: more than {most} ranks ({reason}); ask for at most {most}")
    return asked


def run() -> int:
    """main, with exceptions turned into exit codes: 2 for the user's errors, 1 for ours, 130 and 143 on signals.

    141 when who read the output has gone.
    """
    open_streams()
    signal.signal(signal.SIGTERM, stop)
    try:
        code = main(sys.argv[1:])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except (Exception, KeyboardInterrupt) as error:
        code = report_error(error, sys.argv[1] if len(sys.argv) > 1 else "")
    return close_streams(code)


if __name__ == "__main__":
    sys.exit(run())
