"""Write the judges' result file: result.jsonl, similarity.py and manifest.json, checked before they appear.

`./entrypoint.sh predict --data data --split test --model weights/model.safetensors --submit submit`
"""

import hashlib
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
from tqdm import tqdm

from tongkuan import TOP, __version__
from tongkuan.base.errors import UserError, entrypoint
from tongkuan.base.files import check_target, publish, sha256_of
from tongkuan.base.machine import processor_of
from tongkuan.encode.blend import blend
from tongkuan.encode.cache import VERSIONED
from tongkuan.encode.encode import Embeddings, batch_size, slow_precision
from tongkuan.encode.inference import Inference, open_inference
from tongkuan.encode.store import ItemStore
from tongkuan.records.items import Pair, pair_file
from tongkuan.records.result import format_embedding, prediction_row
from tongkuan.result.precision import cost_line, exact_embeddings, sample_of
from tongkuan.settings import Precision

# In the image a folder mounted over submit/ hides the first; the Dockerfile keeps the second for that.
SIMILARITY = next(path for path in (TOP / "submit" / "similarity.py", TOP / "code" / "similarity.py") if path.is_file())


@dataclass(frozen=True, slots=True)
class Rows:
    """The lines of result.jsonl in the order of the pairs, formatted anew each time they are gone through."""

    pairs: Sequence[Pair]
    texts: Mapping[str, bytes]
    threshold: float

    def __iter__(self) -> Iterator[bytes]:
        for pair in self.pairs:
            yield prediction_row(pair.left, self.texts[pair.left], pair.right, self.texts[pair.right], self.threshold)


@dataclass(frozen=True, slots=True)
class Predicted:
    """What there is to write of a split: rows, the manifest less the hashes of outputs, and lines for the user."""

    rows: Rows
    manifest: dict[str, Any]
    notes: list[str]


def predict(
    data_dir: Path,
    split: str,
    model_path: Path,
    submit_dir: Path,
    encode_batch: int | None = None,
    precision: Precision | None = None,
    threshold: float | None = None,
    cache_dir: Path | None = None,
    blended: bool = False,
) -> None:
    """Predict every pair of a split. UserError before any encoding when an input or a folder is unfit."""
    if blended and threshold is None:
        words = ("--split", "valid", "--data", data_dir, "--model", model_path, "--blend")
        raise UserError(
            f"--blend: it moves all scores, and the model's threshold with them is not known; run "
            f"{entrypoint('evaluate', *words)}, and give the best threshold it finds by --threshold"
        )
    outputs = {"result": submit_dir / "result.jsonl", "similarity": submit_dir / SIMILARITY.name}
    for path in (*outputs.values(), submit_dir / "manifest.json"):
        check_target(path)
    found = compute(data_dir, split, model_path, encode_batch, precision, threshold, cache_dir, blended)
    if found is None:
        return
    write_result(outputs["result"], found.rows)
    if SIMILARITY.resolve() != outputs["similarity"].resolve():
        with publish(outputs["similarity"]) as file, SIMILARITY.open("rb") as source:
            shutil.copyfileobj(source, file)
    found.manifest["sha256"] |= {name: sha256_of(path) for name, path in outputs.items()}
    with publish(submit_dir / "manifest.json") as file:
        file.write(orjson.dumps(found.manifest, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS) + b"\n")
    num_pairs, num_items = (found.manifest[name] for name in ("pairs", "items"))
    print(f"{outputs['result']}: {num_pairs} pairs, {num_items} items, threshold {found.rows.threshold:.6g}")
    for note in found.notes:
        print(note)
    print(f"next: {entrypoint('check', '--submit', submit_dir, '--pairs', pair_file(data_dir, split))}")


def compute(
    data_dir: Path,
    split: str,
    model_path: Path,
    encode_batch: int | None,
    precision: Precision | None,
    threshold: float | None,
    cache_dir: Path | None = None,
    blended: bool = False,
    is_compared: bool = True,
) -> Predicted | None:
    """Encode the items of a split's pairs on all ranks; None on all but the first. Writes nothing but the cache.

    `is_compared`: whether some verdicts are compared with those at fp32.
    """
    with open_inference(data_dir, split, model_path, precision, encode_batch, cache_dir) as run:
        if run.ranks.is_first and (warning := slow_precision(run.ranks.device, run.precision)):
            print(warning)
        # Where neighbours count, some items say nothing of the others: evaluate compares all.
        held = sample_of(run.pairs) if is_compared and not blended else []
        exact = exact_embeddings(run, held)
        embeddings = run.encode("predict")
    if not run.ranks.is_first:
        return None
    if blended:
        embeddings = blend(embeddings)
    rows = format_rows(run.pairs, embeddings, float(run.card.threshold if threshold is None else threshold))
    cache = run.caches[run.precision]
    images = images_hash(run.store, run.item_ids, cache.picture_hashes if cache else {})
    facts = {
        "precision": run.precision,
        "split": split,
        "threshold": rows.threshold,
        "pairs": len(run.pairs),
        "items": len(run.item_ids),
        "encode_batch": batch_size(run.settings, run.card.settings, run.ranks.device),
        "images_sha256": images,
        "blank_pictures": sorted(run.store.unreadable),
    } | ({"blended": True} if blended else {})
    notes = [*run.store.coverage(), *filter(None, [run.store.warning()])]
    if exact is not None:
        notes.append(cost_line(held, embeddings, exact, rows.threshold, run.precision))
    return Predicted(rows, manifest_of(run, facts), notes)


def format_rows(pairs: Sequence[Pair], embeddings: Mapping[str, Embeddings], threshold: float) -> Rows:
    """Rows of embeddings float32 (D,) by item. UserError when a number is not finite."""
    try:
        texts = {item_id: format_embedding(embedding) for item_id, embedding in embeddings.items()}
    except ValueError as error:
        raise UserError(f"{error}; the model is damaged or --precision is too low for it: train again") from error
    return Rows(pairs, texts, threshold)


def write_result(path: Path, rows: Rows) -> None:
    """One line a pair in the order of the pairs; read back before it gets its name."""
    with publish(path) as file:
        file.writelines(tqdm(rows, desc="write", unit="pair", total=len(rows.pairs), disable=None))
        file.flush()
        with Path(file.name).open("rb") as written:
            for number, (line, row) in enumerate(zip(written, rows, strict=True), 1):
                if line != row:
                    raise RuntimeError(f"{path}:{number}: reads back otherwise than it was written; check the disk")


def images_hash(store: ItemStore, item_ids: Iterable[str], known: Mapping[str, str]) -> str:
    """SHA-256 over (name, SHA-256 of the file) of the items' pictures, sorted by name; `known` are hashed already."""
    digest = hashlib.sha256()
    for name in sorted({name for item_id in item_ids if (name := store.items[item_id].image_name)}):
        path = store.image_dir / name
        found = known.get(name) or (sha256_of(path) if path.is_file() else "missing")
        digest.update(f"{name}\0{found}\n".encode())
    return digest.hexdigest()


def manifest_of(run: Inference, facts: dict[str, Any]) -> dict[str, Any]:
    """What made this result: hashes of the inputs, settings, versions. No clock, no host, no path."""
    return {
        "tongkuan": __version__,
        "sha256": {name: sha256_of(file) for name, file in run.files.items()},
        **facts,
        "model_settings": run.card.settings.model_dump(mode="json"),
        "model_facts": run.card.facts,
        "device": run.ranks.device.type,
        "processor": processor_of(run.ranks.device),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONED},
    }
