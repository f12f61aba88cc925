"""Embeddings kept on disk by content: a second run encodes nothing, a killed one goes on where it was.

`./entrypoint.sh predict --cache runs/cache`

A file holds one whole batch. The last bits of an embedding depend on the batch it was computed in: on how far its text
was padded, and on how many rows the matrix products had. Embeddings kept one by one and put together anew would differ
from those of a run without a cache; a batch that comes back for exactly the same batch does not. So one changed item
costs its own batch, and those whose items moved.

A file's name is the SHA-256 of all that decides its numbers: model file, precision, processor, versions, code, the
side that pictures put by hand are squashed to, and of each item in order its tokens and its picture file. Nothing is
ever out of date; the folder may be deleted at any time.
"""

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import orjson
import torch
from numpy.typing import NDArray

from tongkuan.base.files import publish, sha256_of
from tongkuan.base.machine import processor_of
from tongkuan.encode.store import ItemStore
from tongkuan.settings import Precision

# Packages that decide the bits of an embedding.
VERSIONED = ("torch", "timm", "transformers", "tokenizers", "numpy", "pillow")
RESIZER = "cykooz-resizer"  # of pictures put by hand
# Ours that do, between tokens and picture files on one side and embeddings on the other, and this file's format.
SOURCES = (
    "ranks/arithmetic",
    "encode/cache",
    "encode/encode",
    "encode/store",
    "model/colour",
    "model/depthwise",
    "model/encoders",
    "model/first_token",
    "model/halves",
    "model/kept",
    "model/norms",
    "model/one",
    "model/towers",
    "model/trunk",
    "model/windows",
    "records/arrays",
    "records/colours",
    "records/pictures",
    "records/words",
)
PACKAGE = Path(__file__).resolve().parents[1]
CHECKSUM = hashlib.sha256().digest_size  # bytes


class Cache:
    """Batches of embeddings in a folder, for one model at one precision on one kind of processor; safe for threads."""

    def __init__(self, folder: Path, model_path: Path, precision: Precision, device: torch.device) -> None:
        self.folder = folder
        self.picture_hashes: dict[str, str] = {}
        recipe = {
            "model": sha256_of(model_path),
            "precision": precision,
            "processor": processor_of(device),
            "torch": torch.__version__,  # tells builds for CPU and CUDA apart, as the package's version may not
            "versions": {name: version(name) for name in (*VERSIONED, RESIZER)},
            "sources": {name: sha256_of(PACKAGE / f"{name}.py") for name in SOURCES},
        }
        self._recipe = orjson.dumps(recipe, option=orjson.OPT_SORT_KEYS)

    def load(self, store: ItemStore, item_ids: Sequence[str]) -> NDArray[np.float32] | None:
        """Embeddings (N, 2D) of exactly this batch, or None. What is damaged counts as not there."""
        key, count, size = self.key(store, item_ids), len(item_ids), 2 * store.settings.embedding_size
        try:
            data = (self.folder / key).read_bytes()
        except OSError:
            return None
        body = data[CHECKSUM:]
        if data[:CHECKSUM] != checksum(key, body) or len(body) != count * (1 + 4 * size):
            return None
        # Pictures are not opened again, so the file says which were blank: the manifest names them.
        store.unreadable |= {
            name
            for item_id, is_there in zip(item_ids, body, strict=False)
            if (name := store.picture(item_id)) and not is_there
        }
        return np.frombuffer(body, "<f4", offset=count).reshape(count, size).astype(np.float32)

    def save(
        self,
        store: ItemStore,
        item_ids: Sequence[str],
        has_image: NDArray[np.bool_],
        embeddings: NDArray[np.float32],
    ) -> None:
        """Keep a batch: a checksum, one byte an item (whether it has a picture), then the numbers row by row."""
        key = self.key(store, item_ids)
        body = has_image.astype(np.uint8).tobytes() + embeddings.astype("<f4").tobytes()
        with publish(self.folder / key) as file:
            file.write(checksum(key, body) + body)

    def key(self, store: ItemStore, item_ids: Sequence[str]) -> str:
        """The name of a batch's file."""
        pictures = [self.picture_hash(store, item_id) for item_id in item_ids]
        words = [store.words(item_id) for item_id in item_ids] if store.reads_words else []
        asked = [self._recipe.decode(), store.tokens(item_ids), pictures, store.side, *map(repr, words)]
        contents = orjson.dumps(asked, option=orjson.OPT_SERIALIZE_NUMPY)
        return hashlib.sha256(contents).hexdigest()

    def picture_hash(self, store: ItemStore, item_id: str) -> str:
        """SHA-256 of the item's picture file, read once; a word when there is none."""
        name = store.picture(item_id)
        if not name:
            return "none"
        if name not in self.picture_hashes:
            try:
                self.picture_hashes[name] = sha256_of(store.image_dir / name)
            except (OSError, ValueError):  # ValueError: a name that no file can have
                return "missing"
        return self.picture_hashes[name]


def open_cache(folder: Path | None, model_path: Path, precision: Precision, device: torch.device) -> Cache | None:
    """A Cache, or None without a folder."""
    return None if folder is None else Cache(folder, model_path, precision, device)


def checksum(key: str, body: bytes) -> bytes:
    """Of a file's contents under this name."""
    return hashlib.sha256(key.encode() + body).digest()
