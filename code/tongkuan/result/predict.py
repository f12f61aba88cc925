"""Write the judges' result file: result.jsonl, similarity.py and manifest.json, checked before they appear.

`./entrypoint.sh predict --data data --split test --model weights/model.safetensors --submit submit`
"""

import hashlib
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
from tqdm import tqdm

from tongkuan import __version__
from tongkuan.base.errors import UserError, entrypoint
from tongkuan.base.files import check_target, check_writable, publish, sha256_of
from tongkuan.base.machine import processor_of
from tongkuan.encode.cache import VERSIONED, open_cache
from tongkuan.encode.encode import Embeddings, batch_size, distinct_items, encode, settle
from tongkuan.encode.store import open_store
from tongkuan.model.modelfile import ModelCard, load_model
from tongkuan.model.towers import TOP
from tongkuan.ranks.group import Ranks, ranks
from tongkuan.records.items import (
    Item,
    Pair,
    format_embedding,
    item_file,
    pair_file,
    prediction_row,
    read_items,
    read_pairs,
)
from tongkuan.records.rows import given
from tongkuan.settings import DataSettings, Precision

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
    settings: DataSettings,
    precision: Precision = "fp32",
    threshold: float | None = None,
    cache_dir: Path | None = None,
) -> None:
    """Predict every pair of a split. UserError before any encoding when an input or a folder is unfit."""
    for name in ("result.jsonl", SIMILARITY.name, "manifest.json"):
        check_target(submit_dir / name)
    if cache_dir is not None:
        check_writable(cache_dir)
    found = compute(data_dir, split, model_path, settings, precision, threshold, cache_dir)
    if found is None:
        return
    write_result(submit_dir / "result.jsonl", found.rows)
    if SIMILARITY.resolve() != (submit_dir / SIMILARITY.name).resolve():
        with publish(submit_dir / SIMILARITY.name) as file, SIMILARITY.open("rb") as source:
            shutil.copyfileobj(source, file)
    outputs = {"result": submit_dir / "result.jsonl", "similarity": submit_dir / "similarity.py"}
    found.manifest["sha256"] |= {name: sha256_of(file) for name, file in outputs.items()}
    with publish(submit_dir / "manifest.json") as file:
        file.write(orjson.dumps(found.manifest, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS) + b"\n")
    num_pairs, num_items = (found.manifest[name] for name in ("pairs", "items"))
    print(f"{submit_dir / 'result.jsonl'}: {num_pairs} pairs, {num_items} items, threshold {found.rows.threshold:.6g}")
    for note in found.notes:
        print(note)
    print(f"next: {entrypoint('check', '--submit', submit_dir, '--pairs', pair_file(data_dir, split))}")


def compute(
    data_dir: Path,
    split: str,
    model_path: Path,
    settings: DataSettings,
    precision: Precision,
    threshold: float | None,
    cache_dir: Path | None = None,
) -> Predicted | None:
    """Encode the items of a split's pairs on all ranks; None on all but the first. Writes nothing but the cache."""
    model, card = load_model(model_path)
    items_path, pairs_path = given(item_file(data_dir, split)), given(pair_file(data_dir, split))
    items = read_items(items_path)
    pairs = read_pairs(pairs_path, items, labels="optional", items_path=items_path)
    store = open_store(items, data_dir, card.settings, card.open_tokenizer(), cache_mb=0)
    item_ids = distinct_items(pairs)
    with ranks() as fellows:
        cache = open_cache(cache_dir, model_path, precision, fellows.device)
        if (warning := settle(model, fellows.device, precision)) and fellows.is_first:
            print(warning)
        embeddings = encode(model, store, item_ids, settings, fellows, precision, "predict", cache)
    if not fellows.is_first:
        return None
    rows = format_rows(pairs, embeddings, float(card.threshold if threshold is None else threshold))
    facts = {
        "precision": precision,
        "split": split,
        "threshold": rows.threshold,
        "pairs": len(pairs),
        "items": len(item_ids),
        "encode_batch": batch_size(settings, card.settings, fellows.device),
        "images_sha256": images_hash(
            data_dir, [items[item_id] for item_id in item_ids], cache.picture_hashes if cache else {}
        ),
        "blank_pictures": sorted(store.unreadable),
    }
    inputs = {"model": model_path, "items": items_path, "pairs": pairs_path}
    notes = [*store.coverage(), *filter(None, [store.complaint()])]
    return Predicted(rows, manifest_of(inputs, facts, card, fellows), notes)


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


def images_hash(data_dir: Path, items: Sequence[Item], known: Mapping[str, str]) -> str:
    """SHA-256 over (name, SHA-256 of the file) of the pictures used, sorted by name; `known` are hashed already."""
    digest = hashlib.sha256()
    for name in sorted({item.image_name for item in items if item.image_name}):
        path = data_dir / "images" / name
        found = known.get(name) or (sha256_of(path) if path.is_file() else "missing")
        digest.update(f"{name}\0{found}\n".encode())
    return digest.hexdigest()


def manifest_of(inputs: dict[str, Path], facts: dict[str, Any], card: ModelCard, fellows: Ranks) -> dict[str, Any]:
    """What made this result: hashes of the inputs, settings, versions. No clock, no host, no path."""
    return {
        "tongkuan": __version__,
        "sha256": {name: sha256_of(file) for name, file in inputs.items()},
        **facts,
        "model_settings": card.settings.model_dump(mode="json"),
        "model_facts": card.facts,
        "device": fellows.device.type,
        "processor": processor_of(fellows.device),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONED},
    }
