"""What verbs may be given: each option once, and the parser. No torch: a wrong option is answered at once.

Examples go on from what `./entrypoint.sh demo` leaves in `runs/demo`, so that each can be pasted as it stands.
"""

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tongkuan.base.errors import UserError, clip, nearest
from tongkuan.base.numbers import Real, Whole
from tongkuan.match.options import STORE_TOKEN

HOST_PORT = re.compile(r"[^:/\s]+:[0-9]{1,5}", re.ASCII)
NEGATIVE = re.compile(r"-(\.?[0-9]|inf|nan)", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """Options of a verb. `example` is a whole command; `more` stands between the options and it."""

    def __init__(self, verb: str, about: str, example: str, more: str = "") -> None:
        super().__init__(
            prog=f"./entrypoint.sh {verb}",
            description=about,
            epilog=f"{more}example, after ./entrypoint.sh demo:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._negative_number_matcher = NEGATIVE  # argparse's own takes the value -1e-3 for an option
        self.example = example

    def error(self, message: str) -> Any:
        """UserError with the nearest known option."""
        if message.startswith("unrecognized arguments"):
            known = [option for action in self._actions for option in action.option_strings]
            for word in message.split():
                if word.startswith("--"):
                    message += nearest(word.partition("=")[0], known)
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


@dataclass(frozen=True)
class Option:
    """An option of a verb, which fills the parameter `parameter` of the verb's function."""

    name: str
    """Empty: what stands between the options."""
    parameter: str
    metavar: str | tuple[str, ...] | None
    help: str
    default: Any = None
    type: Callable[[str], Any] | None = Path
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of argparse's add_argument."""
    also: str = ""
    """A second name."""

    def but(self, help: str = "", **changes: Any) -> "Option":
        """The same option with another help or default."""
        return replace(self, help=help or self.help, **changes)

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        """Add it to a parser; its help ends in the default."""
        shown = f"{self.default:g}" if isinstance(self.default, float) else self.default
        given = {"metavar": self.metavar, "default": self.default, "type": self.type, **self.more}
        parser.add_argument(
            *filter(None, (self.name, self.also)),
            dest=self.parameter,
            help=self.help if shown is None else f"{self.help} (default {shown})",
            **{name: value for name, value in given.items() if value is not None},
        )


def switch(name: str, parameter: str, help: str) -> Option:
    """An option without a value."""
    return Option(name, parameter, None, help, type=None, more={"action": "store_true"})


def real_or_auto(text: str) -> float | None:
    """An argparse type: a finite number, or None for `auto`."""
    return None if text == "auto" else Real()(text)


def span(text: str) -> slice:
    """An argparse type: A:B with A below B, as Python's slices; either may be left out."""
    found = re.fullmatch("([0-9]{0,9}):([0-9]{0,9})", text)
    first, last = (int(side) if side else None for side in found.groups()) if found else (0, 0)
    if last is not None and last <= (first or 0):
        raise argparse.ArgumentTypeError(f"{clip(text)} is no A:B with A below B; 0:4 are the first four")
    return slice(first, last)


def ray_address(text: str) -> str:
    """An argparse type: where a Ray cluster answers."""
    if not HOST_PORT.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{clip(text)} is no HOST:PORT; `ray start` prints it")
    return text


def host_port(text: str) -> tuple[str, int]:
    """An argparse type: where ranks of several hosts meet."""
    host, _, port = text.rpartition(":")
    if not HOST_PORT.fullmatch(text) or not 0 < int(port) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{clip(text)} is no HOST:PORT; 10.0.0.1:29500, say")
    return host, int(port)


def server_url(text: str) -> str:
    """An argparse type: http://HOST:PORT or https; what may be a password is neither taken nor shown."""
    try:
        url = urlsplit(text)
        is_one = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0 and text.isprintable()
    except ValueError:
        is_one = False
    if not is_one or "@" in text or url.path.strip("/") or url.query or url.fragment:
        raise argparse.ArgumentTypeError(f"no http://HOST:PORT; a token goes into {STORE_TOKEN}")
    return text.rstrip("/")


def collection_name(text: str) -> str:
    """An argparse type: a name as Milvus takes it."""
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,199}", text):
        raise argparse.ArgumentTypeError(f"{clip(text)} is no name of letters, digits and _, a letter first")
    return text


RAW = Option("--raw", "raw_dir", "DIR", "to fill", Path("data/raw"))
DATA = Option("--data", "data_dir", "DIR", "item files and images/", Path("data"))
SPLIT = Option("--split", "split", "S", "which item files", "test", str)
MODEL = Option("--model", "model_path", "FILE", "the model", Path("weights/model.safetensors"))
SUBMIT = Option("--submit", "submit_dir", "DIR", "the result", Path("submit"))
PAIRS = Option("--pairs", "pairs_path", "FILE", "the pairs that were predicted", more={"required": True})
# The second name is for torchrun, which takes --run for the beginning of an option of its own.
RUN = Option("--run", "run_dir", "DIR", "checkpoints and curves (default runs/PRESET)", also="--run-dir")
OUT = Option("--out", "out", "FILE", "the page")
PRESET = Option("--preset", "preset", "P", "a name or a YAML file", "ccks2022-63", str)
OVERRIDES = Option("", "overrides", "section.key=value", "such as train.steps=500", type=None, more={"nargs": "*"})
# Six families of four at least: one of each kind for each split.
PRODUCTS = Option("--products", "products", "N", "how many", 1500, Whole(24, 100_000))
THRESHOLD = Option("--threshold", "threshold", "T", "instead of the model's own", type=Real())
PRECISION = Option(
    "--precision",
    "precision",
    None,
    "of the encoders (default: bf16 on a GPU that multiplies it, else fp32)",
    type=str,
    more={"choices": ("fp32", "tf32", "bf16", "fp16", "bf16-residual", "bf16-compiled")},
)
ENCODE_BATCH = Option(
    "--encode-batch", "encode_batch", "N", "items a batch (default: by device and picture)", type=Whole(1, 65_536)
)
CACHE = Option("--cache", "cache_dir", "DIR", "keep embeddings: a killed run goes on from them")
NPROC = Option("--nproc", "nproc", "N", "ranks (default: one a GPU, one without)", type=Whole(1, 1024))
NNODES = Option("--nnodes", "nnodes", "N", "hosts on each of which this command is run", type=Whole(1, 1024))
NODE_RANK = Option("--node-rank", "node_rank", "R", "which of them this one is, from 0", type=Whole(0, 1023))
MASTER = Option("--master", "master", "HOST:PORT", "where they meet: an address of host 0", type=host_port)
STYLE = Option("--attributes", "style", None, "how to read them", "quoted", str, {"choices": ("quoted", "published")})
PAIR = Option(
    "--pair", "pair_ids", ("A", "B"), "two item_ids (default: the split's first pair)", None, str, {"nargs": 2}
)
# At most the pixels of a picture, which the model knows.
GRID = Option("--grid", "grid", "N", "N x N patches of a picture", 8, Whole(1, 4096))
BLEND = switch("--blend", "blended", "move each item towards its nearest neighbours among the split's; see accuracy.md")
DRY_RUN = switch("--dry-run", "dry_run", "only report counts, memory and, by a probe, time")
WITHIN = Option("--within", "within", "W", "none, or category", "none", str, {"choices": ("none", "category")})
CANDIDATES = Option("--candidates", "candidates", "N", "nearest of a listing to score", 50, Whole(1, 1000))
SCALED = Option("--threshold", "threshold", "T", "auto: by labels, if any", "auto", real_or_auto)
RECALL = Option("--recall", "recall", "R", "of pairs that could match", 0.99, Real(above=0, most=1))
ENGINE = Option("--engine", "engine", "E", "exact, faiss or auto", "auto", str, {"choices": ("auto", "exact", "faiss")})
GROUPS = Option("--groups", "groups", "G", "average, or strict", "average", str, {"choices": ("average", "strict")})
PARTITION_SIZE = Option("--partition-size", "partition_size", "N", "listings a file", 100_000, Whole(1, 10_000_000))
PARTITIONS = Option("--partitions", "wanted", "A:B", "encode these alone: one job of many", type=span)
RAY = Option("--ray", "ray_address", "HOST:PORT", "the nodes of this Ray cluster do it", type=ray_address)
MATCHED = OUT.but("what match run made", metavar="DIR", parameter="out_dir", default=Path("match"))
STORE = Option("--store", "url", "URL", "a Milvus server, http://HOST:19530", type=server_url)
COLLECTION = Option("--collection", "collection", "NAME", "where it keeps them", "tongkuan", collection_name)
# Of the verbs that encode all items of a split.
ENCODING = (MODEL, THRESHOLD, PRECISION, ENCODE_BATCH, CACHE, NPROC)
