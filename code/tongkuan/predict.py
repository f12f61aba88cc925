"""Write the judges' result file: result.jsonl, similarity.py and manifest.json, checked before they appear.

`./entrypoint.sh predict --data data --split test --model weights/model.safetensors --submit submit`
"""

import hashlib
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
from tqdm import tqdm

from tongkuan import __version__
from tongkuan.cache import VERSIONED, open_cache
from tongkuan.checkpoint import ModelCard, load_model
from tongkuan.config import DataSettings, Precision
from tongkuan.data import open_store
from tongkuan.distributed import Ranks, ranks
from tongkuan.encode import Embeddings, batch_size, distinct_items, encode, settle
from tongkuan.errors import UserError
from tongkuan.files import check_target, check_writable, publish, sha256_of
from tongkuan.model import TOP
from tongkuan.processor import processor_of
from tongkuan.records import (
    Item,
    Pair,
    format_embedding,
    item_file,
    pair_file,
    prediction_row,
    read_items,
    read_pairs,
)
from tongkuan.rows import given

# In the image a folder mounted over submit/ hides the first; the Dockerfile keeps the second for that.
SIMILARITY = next(path for path in (TOP / "submit" / "similarity.py", TOP / "code" / "similarity.py") if path.is_file())


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
    model, card = load_model(model_path)
    items_path, pairs_path = given(item_file(data_dir, split)), given(pair_file(data_dir, split))
    items = read_items(items_path)
    pairs = read_pairs(pairs_path, items, labels="optional", items_path=items_path)
    store = open_store(items, data_dir, card.settings, card.open_tokenizer(), cache_mb=0)
    chosen = card.threshold if threshold is None else threshold
    with ranks() as fellows:
        item_ids = distinct_items(pairs)
        cache = open_cache(cache_dir, model_path, precision, fellows.device)
        if (warning := settle(model, fellows.device, precision)) and fellows.is_first:
            print(warning)
        embeddings = encode(model, store, item_ids, settings, fellows, precision, "predict", cache)
        if not fellows.is_first:
            return
        write_result(submit_dir / "result.jsonl", pairs, embeddings, chosen)
        if SIMILARITY.resolve() != (submit_dir / SIMILARITY.name).resolve():
            with publish(submit_dir / SIMILARITY.name) as file, SIMILARITY.open("rb") as source:
                shutil.copyfileobj(source, file)
        inputs = {"model": model_path, "items": items_path, "pairs": pairs_path}
        outputs = {"result": submit_dir / "result.jsonl", "similarity": submit_dir / "similarity.py"}
        facts = {
            "precision": precision,
            "split": split,
            "threshold": chosen,
            "pairs": len(pairs),
            "items": len(item_ids),
            "encode_batch": batch_size(settings, card.settings, fellows.device),
            "images_sha256": images_hash(
                data_dir, [items[item_id] for item_id in item_ids], cache.picture_hashes if cache else {}
            ),
            "blank_pictures": sorted(store.unreadable),
        }
        write_manifest(submit_dir / "manifest.json", inputs | outputs, facts, card, fellows)
    for line in store.coverage():
        print(line)
    print(f"{submit_dir / 'result.jsonl'}: {len(pairs)} pairs, {len(item_ids)} items, threshold {chosen:.6g}")
    if complaint := store.complaint():
        print(complaint)
    print(f"next: ./entrypoint.sh check --submit {submit_dir} --pairs {pairs_path}")


def write_result(path: Path, pairs: Sequence[Pair], embeddings: dict[str, Embeddings], threshold: float) -> None:
    """One line a pair in the order of the pairs; read back before it gets its name."""
    try:
        texts = {item_id: format_embedding(embedding) for item_id, embedding in embeddings.items()}
    except ValueError as error:
        raise UserError(f"{error}; the model is damaged or --precision is too low for it: train again") from error

    def rows() -> Iterator[bytes]:
        for pair in pairs:
            yield prediction_row(pair.left, texts[pair.left], pair.right, texts[pair.right], threshold)

    with publish(path) as file:
        file.writelines(tqdm(rows(), desc="write", unit="pair", total=len(pairs), disable=None))
        file.flush()
        with Path(file.name).open("rb") as written:
            for number, (line, row) in enumerate(zip(written, rows(), strict=True), 1):
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


def write_manifest(path: Path, files: dict[str, Path], facts: dict[str, Any], card: ModelCard, fellows: Ranks) -> None:
    """What made this result: hashes of inputs and outputs, settings, versions. No clock, no host, no path."""
    manifest = {
        "tongkuan": __version__,
        "sha256": {name: sha256_of(file) for name, file in files.items()},
        **facts,
        "model_settings": card.settings.model_dump(mode="json"),
        "model_facts": card.facts,
        "device": fellows.device.type,
        "processor": processor_of(fellows.device),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONED},
    }
    with publish(path) as file:
        file.write(orjson.dumps(manifest, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS) + b"\n")
