"""The verbs: `./entrypoint.sh VERB [--option value] [section.key=value]`; without a verb, what there is."""

import argparse
import importlib
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tongkuan.command import DATA, Parser
from tongkuan.ending import report_error, stop
from tongkuan.errors import UserError, clip, nearest
from tongkuan.files import check_apart_from_data

DATA_SCRIPTS = Path(__file__).resolve().parents[2] / "data_scripts"
PRESET = "ccks2022-63"
MODEL = Path("weights/model.safetensors")

Arguments = argparse.Namespace


def add_model_options(parser: argparse.ArgumentParser, split: str) -> None:
    """Options of the verbs that run a trained model."""
    parser.add_argument(
        "--data", type=Path, default=DATA, metavar="DIR", help=f"item files and images/ (default {DATA})"
    )
    parser.add_argument("--split", default=split, metavar="S", help=f"which item files (default {split})")
    parser.add_argument("--model", type=Path, default=MODEL, metavar="FILE", help=f"the model (default {MODEL})")
    parser.add_argument("--threshold", type=float, metavar="T", help="instead of the model's own")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the encoders (default fp32)"
    )
    parser.add_argument("--encode-batch", type=int, metavar="N", help="items a batch (default: by device and picture)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep embeddings: a killed run goes on from them")
    add_nproc(parser)


def add_nproc(parser: argparse.ArgumentParser) -> None:
    """Ranks; every GPU by itself."""
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks (default: one a GPU, one without)")


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Say what would be done."""
    parser.add_argument("--dry-run", action="store_true", help="only the plan: counts, memory and, by a probe, time")


def add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default=PRESET, metavar="P", help=f"a name or a YAML file (default {PRESET})")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as train.steps=500")


def run_settings(arguments: Arguments) -> None:
    from tongkuan.config import describe, resolve

    print(describe(resolve(arguments.preset, arguments.overrides)))
    print(f"# next: ./entrypoint.sh train --preset {arguments.preset}")


def add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default=PRESET, metavar="P", help=f"a name or a YAML file (default {PRESET})")
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR", help=f"what split made (default {DATA})")
    parser.add_argument("--run", type=Path, metavar="DIR", help="checkpoints and curves (default runs/PRESET)")
    parser.add_argument("--model", type=Path, default=MODEL, metavar="FILE", help=f"the best one (default {MODEL})")
    add_nproc(parser)
    add_dry_run(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as train.steps=500")


def run_train(arguments: Arguments) -> None:
    from tongkuan.config import load_settings

    run_dir = arguments.run or Path("runs") / Path(arguments.preset).stem
    settings = load_settings(arguments.preset, arguments.overrides)
    if arguments.dry_run:
        from tongkuan.plan import plan_training

        plan_training(settings, arguments.data, run_dir)
        return
    from tongkuan.train import train

    train(settings, arguments.data, run_dir, arguments.model)


def add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="FILE", help="a released .pth, whole or in parts, to import")
    parser.add_argument(
        "--preset", default=PRESET, metavar="P", help=f"its recipe, or whose encoders to fetch (default {PRESET})"
    )
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
    add_dry_run(parser)


def run_predict(arguments: Arguments) -> None:
    from tongkuan.config import DataSettings
    from tongkuan.predict import predict

    settings = DataSettings(encode_batch=arguments.encode_batch)
    if arguments.dry_run:
        from tongkuan.plan import plan_prediction

        plan_prediction(arguments.data, arguments.split, arguments.model, settings, arguments.precision)
        return
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
    parser.add_argument(
        "--data", type=Path, default=DATA, metavar="DIR", help=f"item files and images/ (default {DATA})"
    )
    parser.add_argument("--model", type=Path, default=MODEL, metavar="FILE", help=f"the model (default {MODEL})")


def run_verify(arguments: Arguments) -> None:
    from tongkuan.verify import verify

    verify(arguments.submit, arguments.data, arguments.model)


def add_submit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--submit", type=Path, default=Path("submit"), metavar="DIR", help="the result (default submit)"
    )


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
    parser.add_argument(
        "--data", type=Path, default=DATA, metavar="DIR", help=f"item files and images/ (default {DATA})"
    )
    parser.add_argument("--run", type=Path, metavar="DIR", help="a training run: adds its curves")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another result of these pairs to compare with")
    parser.add_argument("--out", type=Path, metavar="FILE", help=".html (default SUBMIT/report.html)")


def run_report(arguments: Arguments) -> None:
    from tongkuan.report import report

    out = arguments.out or arguments.submit / "report.html"
    report(arguments.submit, arguments.pairs, arguments.data, out, arguments.run, arguments.against)


def add_explain(parser: argparse.ArgumentParser) -> None:
    help_of_pair = "two item_ids (default: the split's first pair)"
    parser.add_argument("--pair", nargs=2, metavar=("A", "B"), help=help_of_pair)
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR", help=f"items and images/ (default {DATA})")
    parser.add_argument("--split", default="test", metavar="S", help="which item file (default test)")
    parser.add_argument("--model", type=Path, default=MODEL, metavar="FILE", help=f"the model (default {MODEL})")
    parser.add_argument("--threshold", type=float, metavar="T", help="instead of the model's own")
    precisions, help_of_precision = ("fp32", "bf16", "fp16"), "of the encoders (default fp32)"
    parser.add_argument("--precision", choices=precisions, default="fp32", help=help_of_precision)
    parser.add_argument("--grid", type=int, default=8, metavar="N", help="N x N patches of a picture (default 8)")
    out = Path("submit/explain.html")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE", help=f"the page (default {out})")


def run_explain(arguments: Arguments) -> None:
    from tongkuan.explain import explain

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


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", type=Path, default=Path("runs/demo"), metavar="DIR", help="its folder (default runs/demo)"
    )
    parser.add_argument("--products", type=int, metavar="N", help="of the catalogue (default: sample's)")
    parser.add_argument("--ablation", action="store_true", help="also train on text alone and on pictures alone")
    add_nproc(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as train.steps=500")


def run_demo(arguments: Arguments) -> None:
    from tongkuan.demo import demo

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
        add_settings,
        run_settings,
    ),
    "weights": Verb(
        "import a released checkpoint, or fetch a preset's encoders ahead",
        "weights --preset small",
        add_weights,
        run_weights,
    ),
    "train": Verb(
        "train a model; the same command resumes",
        f"train --preset demo {DEMO_DATA} --run runs/mine --model runs/mine/model.safetensors train.steps=200",
        add_train,
        run_train,
    ),
    "evaluate": Verb(
        "precision, recall and F1 of a model on labelled pairs",
        f"evaluate {DEMO_DATA} {DEMO_MODEL}",
        add_evaluate,
        run_evaluate,
    ),
    "predict": Verb(
        "write submit/result.jsonl",
        f"predict {DEMO_DATA} {DEMO_MODEL} --submit runs/mine/submit",
        add_predict,
        run_predict,
    ),
    "verify": Verb(
        "predict again from manifest.json and compare to the byte",
        f"verify {DEMO_DATA} {DEMO_MODEL} {SUBMITTED}",
        add_verify,
        run_verify,
    ),
    "check": Verb("hold a result against the judges' contract", f"check {SUBMITTED} {PAIRS}", add_judge, run_check),
    "score": Verb("the judges' F1 of a result", f"score {SUBMITTED} {ANSWERS}", add_judge, run_score),
    "plot": Verb(
        "draw the scores of same and different pairs of a result", f"plot {SUBMITTED} {ANSWERS}", add_plot, run_plot
    ),
    "report": Verb(
        "one page of a result: figures, curves, a slider, pairs with pictures",
        f"report {SUBMITTED} {ANSWERS} {DEMO_DATA} --run runs/demo/train",
        add_report,
        run_report,
    ),
    "explain": Verb(
        "one page of a pair: what its verdict rests on, by taking parts away",
        f"explain {DEMO_DATA} {DEMO_MODEL} --out runs/mine/explain.html",
        add_explain,
        run_explain,
    ),
    "demo": Verb(
        "the whole job on a sample catalogue, in minutes",
        "demo --run runs/quick --products 60 train.steps=100",
        add_demo,
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
    if str(DATA_SCRIPTS) not in sys.path:
        sys.path.insert(0, str(DATA_SCRIPTS))
    return importlib.import_module(name)


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
    if name in SCRIPTS:
        return int(script(name).main(rest))
    parser = parser_of(name)
    arguments = parser.parse_intermixed_args(rest)
    folders, files = OUTPUTS.get(name, ((), ()))
    if folders or files:
        given = {option: path for option, path in vars(arguments).items() if path is not None}
        check_apart_from_data(arguments.data, *([given[o] for o in kind if o in given] for kind in (folders, files)))
    if name in RANKED and (count := num_ranks(arguments.nproc)) > 1:
        from tongkuan.distributed import launch

        return launch(count, argv)
    VERBS[name].run(arguments)
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


def run() -> int:
    """main, with exceptions turned into exit codes: 2 for the user's errors, 1 for ours, 130 and 143 on signals."""
    signal.signal(signal.SIGTERM, stop)
    try:
        return main(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as error:
        return report_error(error, sys.argv[1])


if __name__ == "__main__":
    sys.exit(run())
