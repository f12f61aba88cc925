"""What each verb of the package may be told. No torch here: a wrong option is answered at once."""

import argparse
from pathlib import Path

from tongkuan.cli.command import DATA, Real, Whole

PRESET = "ccks2022-63"
MODEL = Path("weights/model.safetensors")
PRECISIONS = ("fp32", "bf16", "fp16")
ENCODE_BATCH = Whole(1, 65_536)
NPROC = Whole(1, 1024)
NUM_PRODUCTS = Whole(24, 100_000)  # of a sample: six families of four, one of each kind for each split
THRESHOLD = Real()


def add_model_options(parser: argparse.ArgumentParser, split: str) -> None:
    """Options of the verbs that run a trained model."""
    add_data(parser, "item files and images/")
    parser.add_argument("--split", default=split, metavar="S", help=f"which item files (default {split})")
    add_model(parser, "the model")
    add_threshold(parser)
    add_precision(parser)
    parser.add_argument(
        "--encode-batch", type=ENCODE_BATCH, metavar="N", help="items a batch (default: by device and picture)"
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep embeddings: a killed run goes on from them")
    add_nproc(parser)


def add_data(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR", help=f"{what} (default {DATA})")


def add_model(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--model", type=Path, default=MODEL, metavar="FILE", help=f"{what} (default {MODEL})")


def add_threshold(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threshold", type=THRESHOLD, metavar="T", help="instead of the model's own")


def add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the encoders (default fp32)")


def add_nproc(parser: argparse.ArgumentParser) -> None:
    """Ranks; every GPU by itself."""
    parser.add_argument("--nproc", type=NPROC, metavar="N", help="ranks (default: one a GPU, one without)")


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Say what would be done."""
    parser.add_argument("--dry-run", action="store_true", help="only the plan: counts, memory and, by a probe, time")


def add_preset(parser: argparse.ArgumentParser, what: str = "a name or a YAML file") -> None:
    parser.add_argument("--preset", default=PRESET, metavar="P", help=f"{what} (default {PRESET})")


def add_overrides(parser: argparse.ArgumentParser, example: str = "train.steps=500") -> None:
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=f"such as {example}")


def add_submit(parser: argparse.ArgumentParser) -> None:
    submit = Path("submit")
    parser.add_argument("--submit", type=Path, default=submit, metavar="DIR", help="the result (default submit)")


# ---------------------------------------------------------------------------------------------------------------------
# A verb each


def add_settings(parser: argparse.ArgumentParser) -> None:
    add_preset(parser)
    add_overrides(parser)


def add_train(parser: argparse.ArgumentParser) -> None:
    add_preset(parser)
    add_data(parser, "what split made")
    parser.add_argument("--run", type=Path, metavar="DIR", help="checkpoints and curves (default runs/PRESET)")
    add_model(parser, "the best one")
    add_nproc(parser)
    add_dry_run(parser)
    add_overrides(parser)


def add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="FILE", help="a released .pth, whole or in parts, to import")
    add_preset(parser, "its recipe, or whose encoders to fetch")
    parser.add_argument("--text-encoder", type=Path, metavar="DIR", help="config.json and vocab.txt of its texts")
    parser.add_argument(
        "--threshold", type=THRESHOLD, default=0.0, metavar="T", help="of the imported model (default 0)"
    )
    parser.add_argument("--out", type=Path, default=MODEL, metavar="FILE", help=f"the imported model (default {MODEL})")
    add_overrides(parser, "model.image.size=224")


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, "valid")


def add_predict(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, "test")
    add_submit(parser)
    add_dry_run(parser)


def add_verify(parser: argparse.ArgumentParser) -> None:
    add_submit(parser)
    add_data(parser, "item files and images/")
    add_model(parser, "the model")


def add_judge(parser: argparse.ArgumentParser) -> None:
    add_submit(parser)
    parser.add_argument("--pairs", type=Path, required=True, metavar="FILE", help="the pairs that were predicted")


def add_plot(parser: argparse.ArgumentParser) -> None:
    add_judge(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help=".svg or .png (default SUBMIT/scores.svg)")


def add_report(parser: argparse.ArgumentParser) -> None:
    add_judge(parser)
    add_data(parser, "item files and images/")
    parser.add_argument("--run", type=Path, metavar="DIR", help="a training run: adds its curves")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another result of these pairs to compare with")
    parser.add_argument("--out", type=Path, metavar="FILE", help=".html (default SUBMIT/report.html)")


def add_explain(parser: argparse.ArgumentParser) -> None:
    help_of_pair, out = "two item_ids (default: the split's first pair)", Path("submit/explain.html")
    parser.add_argument("--pair", nargs=2, metavar=("A", "B"), help=help_of_pair)
    add_data(parser, "items and images/")
    parser.add_argument("--split", default="test", metavar="S", help="which item file (default test)")
    add_model(parser, "the model")
    add_threshold(parser)
    add_precision(parser)
    grid = Whole(1, 4096)  # at most the pixels of a picture, which the model knows
    parser.add_argument("--grid", type=grid, default=8, metavar="N", help="N x N patches of a picture (default 8)")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE", help=f"the page (default {out})")


def add_demo(parser: argparse.ArgumentParser) -> None:
    run = Path("runs/demo")
    parser.add_argument("--run", type=Path, default=run, metavar="DIR", help=f"its folder (default {run})")
    parser.add_argument("--products", type=NUM_PRODUCTS, metavar="N", help="of the catalogue (default: sample's)")
    parser.add_argument("--ablation", action="store_true", help="also train on text alone and on pictures alone")
    add_nproc(parser)
    add_overrides(parser)
