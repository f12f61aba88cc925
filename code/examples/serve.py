"""One listing in, its matches out, without torch: ONNX Runtime, numpy, Pillow, tokenizers and records of ours.

    echo '{"title": "帆布鞋", "attributes": "颜色:白", "picture": "a.jpg"}' |
        PYTHONPATH=code .venv/bin/python -P code/examples/serve.py --model m.onnx --catalogue match --pictures photos

Each line of standard input is a listing as JSON: title, attributes and sku_attributes (a text or an object), picture (a
file's name in --pictures) and category, each of which may be left out. Each is answered by a line, in order:

    {"matches": [{"item_id": "17", "score": 3.1, "scaled": 0.4}]}    the best first
    {"error": "line 2: title must be a text, …"}                     and exit code 2 in the end

The catalogue is a folder that `./entrypoint.sh match run` has filled, or embeddings (N, 2D) as a float32 .npy, whose
rows are the ids. A listing matches those whose score is above the model's threshold and, in such a folder, whose cosine
is above the catalogue's, scaled as `match run` scales it.

Model and catalogue are yours and trusted as any file of yours is; listings may come from anybody.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from tongkuan.base.errors import ReportedError, UserError, clip, missing, nearest
from tongkuan.export.encoder import OnnxEncoder
from tongkuan.records.items import Item, attribute_field, inside, text_field

LONGEST = 1 << 20  # bytes of a listing
KEYS = ("title", "attributes", "sku_attributes", "picture", "category")
NEAREST = 10  # neighbours whose mean cosine says how dense it is about a listing, as for `match run`
SAME = 1e-5  # times its largest number: a listing and its copy differ no more, by what ONNX Runtime rounds otherwise
TOMBSTONES = "tombstones.parquet"  # file, item_id of embeddings that count no more


@dataclass(frozen=True, slots=True)
class Catalogue:
    """N listings, and when a listing matches one of them."""

    item_ids: Sequence[str]
    embeddings: NDArray[np.float32]
    """(N, 2D), [p ; q]."""
    categories: Sequence[str] | None
    """(N,), when only listings of a category are compared."""
    score_above: float
    scaled_above: float | None
    """None: the score alone tells."""
    means: NDArray[np.float64] | None
    """(N,), the mean cosine of each with its nearest, where scaled cosines tell."""


def open_catalogue(path: Path, encoder: OnnxEncoder) -> Catalogue:
    """A folder of `match run`, or an .npy file. UserError when it is neither, or of another model."""
    if not path.exists():
        raise missing(path, "no such catalogue; name a folder of ./entrypoint.sh match run, or an .npy file")
    if path.is_dir():
        return open_folder(path, encoder)
    try:
        embeddings = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: no .npy file of numbers; save one by numpy.save") from error
    ids = [*map(str, range(len(embeddings)))] if embeddings.ndim else []
    return Catalogue(ids, checked(path, embeddings, encoder), None, encoder.card.threshold, None, None)


def open_folder(path: Path, encoder: OnnxEncoder) -> Catalogue:
    """What `match run` has written, and `match add` and `match remove` since."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        manifest = orjson.loads((path / "manifest.json").read_bytes())
        model, within = manifest["sha256"]["model"], manifest["options"]["within"]
        limits = float(manifest["score_above"]), float(manifest["threshold"]["value"])
        gone = set()
        if TOMBSTONES in manifest["files"]:
            dead = pq.read_table(path / TOMBSTONES)
            gone = set(zip(dead["file"].to_pylist(), dead["item_id"].to_pylist(), strict=True))
        tables = []
        for name in sorted(name for name in manifest["files"] if name.startswith("embeddings/")):
            read = pq.read_table(path / name, columns=["item_id", "category", "e"])
            tables.append(
                read.filter(pa.array([(name, item_id) not in gone for item_id in read["item_id"].to_pylist()]))
            )
        table = pa.concat_tables(tables)
        groups = pq.read_table(path / "groups.parquet", columns=["item_id", "mean"])
        mean_of = dict(zip(groups["item_id"].to_pylist(), groups["mean"].to_pylist(), strict=True))
        item_ids = table["item_id"].to_pylist()
        means = np.array([mean_of[item_id] for item_id in item_ids], dtype=np.float64)
        width = table.schema.field("e").type.list_size
        embeddings = np.concatenate([chunk.flatten().to_numpy() for chunk in table["e"].chunks]).reshape(-1, width)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a whole folder of ./entrypoint.sh match run ({clip(str(error), 80)})") from error
    if model != encoder.card.model_sha256:
        raise UserError(f"{path}: matched by another model than the exported one; export that one, or match again")
    categories = table["category"].to_pylist() if within == "category" else None
    return Catalogue(item_ids, checked(path, embeddings, encoder), categories, *limits, means)


def checked(path: Path, embeddings: NDArray[Any], encoder: OnnxEncoder) -> NDArray[np.float32]:
    """The same numbers as float32. UserError when they cannot be embeddings of this model."""
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f" or embeddings.shape[1] != encoder.width:
        found = f"{embeddings.dtype} {embeddings.shape}"
        raise UserError(f"{path}: the model makes float32 (N, {encoder.width}), found {found}; name its embeddings")
    found = np.ascontiguousarray(embeddings, dtype=np.float32)
    if not np.isfinite(found).all():
        raise UserError(f"{path}: holds numbers that are not finite; encode the catalogue again")
    return found


def parse_listing(line: bytes, where: str) -> tuple[Item, str]:
    """(listing, its category) of a line of JSON. UserError for anything else."""
    if len(line.rstrip()) > LONGEST:
        raise UserError(f"{where}: longer than {LONGEST >> 20} MB; shorten the listing")
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({clip(str(error), 60)}); write one listing a line") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a listing is a JSON object, found {clip(row)}")
    for key in row:
        if key not in KEYS:
            raise UserError(f"{where}: unknown key {clip(key)}{nearest(key, KEYS)}; known are {', '.join(KEYS)}")
    title, picture, category = (text_field(row, key, where) for key in ("title", "picture", "category"))
    attributes, of_sku = (attribute_field(row, key, where) for key in ("attributes", "sku_attributes"))
    item = Item("", title, attributes, of_sku, inside(picture), category=category)
    if not (title or attributes or of_sku or item.image_name):
        raise UserError(f"{where}: nothing to compare; give a title, attributes or a picture")
    return item, category


def unit_rows(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each row at length 1; a row of zeros stays as it is."""
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings / np.where(lengths > 0, lengths, 1)


class Matcher:
    """Finds the matches of an embedding in a catalogue by looking at all of it."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        rows = catalogue.embeddings
        self.units = unit_rows(rows)
        self.codes = np.zeros(len(rows), np.int64)
        """(N,), of the categories."""
        self.known: dict[str, int] = {"": 0}
        if catalogue.categories is not None:
            names, self.codes = np.unique(np.array(catalogue.categories, dtype=str), return_inverse=True)
            self.known = {name: code for code, name in enumerate(names.tolist())}

    def matches(self, embedding: NDArray[np.float32], category: str, top: int) -> list[dict[str, Any]]:
        """The best `top` matches of an embedding (2D,), those of the highest score first."""
        code = self.known.get(category if self.catalogue.categories is not None else "")
        scores = scores_of(self.catalogue.embeddings, embedding)
        rows = np.flatnonzero((scores > self.catalogue.score_above) & (self.codes == code))
        scores, scaled = scores[rows], np.full(len(rows), np.nan)
        if (means := self.catalogue.means) is not None and len(rows):
            cosines = self.units @ unit_rows(embedding[None])[0]
            cosines[self.codes != code] = -np.inf
            scaled = 2 * cosines[rows] - self.local_mean(embedding, cosines, means) - means[rows]
            passes = scaled > self.catalogue.scaled_above
            rows, scores, scaled = rows[passes], scores[passes], scaled[passes]
        best = np.argsort(-scores, kind="stable")[:top]
        return [self.match(int(rows[place]), float(scores[place]), float(scaled[place])) for place in best]

    def match(self, row: int, score: float, scaled: float) -> dict[str, Any]:
        """As it is printed."""
        found: dict[str, Any] = {"item_id": self.catalogue.item_ids[row], "score": score}
        return found if np.isnan(scaled) else found | {"scaled": scaled}

    def local_mean(
        self, embedding: NDArray[np.float32], cosines: NDArray[np.float32], means: NDArray[np.float64]
    ) -> float:
        """Mean of the NEAREST cosines (N,) of a listing, copies of one counted once; a copy has the mean of its own."""
        near = np.argsort(-cosines, kind="stable")
        near = near[np.isfinite(cosines[near])]
        rows = self.catalogue.embeddings
        gaps = np.abs(rows[near[:NEAREST]] - embedding).max(axis=1)
        if gaps.min() <= SAME * np.abs(embedding).max():
            return float(means[near[gaps.argmin()]])
        distinct: dict[bytes, float] = {}
        for row in near.tolist():
            distinct.setdefault(rows[row].tobytes(), float(cosines[row]))
            if len(distinct) == NEAREST:
                break
        return sum(distinct.values()) / len(distinct)


def scores_of(embeddings: NDArray[np.float32], embedding: NDArray[np.float32]) -> NDArray[np.float64]:
    """q_a.q_b - p_a.p_b of each row (N, 2D) with one: (N,)."""
    p, q = np.split(embedding.astype(np.float64), 2)
    half = len(p)
    both = embeddings.astype(np.float64)
    found: NDArray[np.float64] = both[:, half:] @ q - both[:, :half] @ p
    return found


def answer(line: bytes, where: str, encoder: OnnxEncoder, matcher: Matcher, pictures: Path, top: int) -> dict[str, Any]:
    """The matches of a line of JSON. UserError when it is no listing."""
    item, category = parse_listing(line, where)
    try:
        embedding = encoder.embed(encoder.feed([item], pictures))[0]
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return {"matches": matcher.matches(embedding, category, top)}


def options() -> argparse.ArgumentParser:
    """What may be given."""
    parser = argparse.ArgumentParser(description="One listing a line in, its matches out, without torch.")
    parser.add_argument("--model", type=Path, required=True, help="what ./entrypoint.sh export wrote")
    parser.add_argument("--catalogue", type=Path, required=True, help="a folder of match run, or an .npy file")
    parser.add_argument("--pictures", type=Path, default=Path(), help="where listings' pictures lie (default: here)")
    parser.add_argument("--top", type=int, default=10, help="matches at most (default 10)")
    parser.add_argument("--threads", type=int, default=1, help="that encode a listing (default 1)")
    return parser


def main() -> int:
    """Answer each line of standard input; 0, or 2 when something was wrong."""
    given = options().parse_args()
    code = 0
    try:
        encoder = OnnxEncoder(given.model, given.threads)
        matcher = Matcher(open_catalogue(given.catalogue, encoder))
        number = 0
        # A line that is too long is read no further than it takes to say so, and to find its end.
        while line := sys.stdin.buffer.readline(LONGEST + 2):
            number += 1
            rest = line
            while len(rest) == LONGEST + 2 and not rest.endswith(b"\n"):
                rest = sys.stdin.buffer.readline(LONGEST + 2)
            if not line.strip():
                continue
            try:
                found = answer(line, f"line {number}", encoder, matcher, given.pictures, given.top)
            except UserError as error:
                found, code = {"error": str(error)}, 2
            sys.stdout.buffer.write(orjson.dumps(found) + b"\n")
            sys.stdout.buffer.flush()
    except ReportedError as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
