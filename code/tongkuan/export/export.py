"""The item encoder of a model as one ONNX file, held against torch before it gets its name.

`./entrypoint.sh export --model weights/model.safetensors --data data --out weights/model.onnx`
"""

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tongkuan.base.errors import UserError, entrypoint
from tongkuan.base.files import check_apart, check_target, sha256_of
from tongkuan.encode.encode import batch_size
from tongkuan.encode.store import ItemStore, open_store
from tongkuan.export.compare import LIMIT, TURNS, Speed, cut, largest_difference, measure
from tongkuan.export.encoder import Card, OnnxEncoder, import_runtime
from tongkuan.export.graph import trace
from tongkuan.export.made import made_items
from tongkuan.export.write import data_of, write
from tongkuan.model.modelfile import ModelCard, load_model
from tongkuan.model.trunk import ItemModel
from tongkuan.records.items import item_file, read_items
from tongkuan.records.rows import given
from tongkuan.settings import DataSettings

CPU = torch.device("cpu")
ALONE = 8  # listings of those that are also encoded one at a time


def export(model_path: Path, data_dir: Path | None, split: str, items: int, out: Path) -> None:
    """Write the model as ONNX and print how near to torch it is and how fast, on `items` listings of a split.

    Without `data_dir` on made ones, which are compared in any case. UserError before any work when something is
    missing, FailureError when an embedding differs by more than LIMIT: then no file is left.
    """
    import_runtime()
    for path in (out, data_of(out)):
        check_target(path)
        check_apart(path, model_path)
    model, card = load_model(model_path)
    with tempfile.TemporaryDirectory() as folder:
        stores = [made_store(Path(folder), card)]
        if data_dir is not None:
            stores.append(split_store(data_dir, split, card, items))
        about = Card(
            float(card.threshold),
            card.tokenizer,
            card.settings.text.max_tokens,
            card.settings.attributes,
            card.settings.attribute_keys,
            stores[-1].side,
            sha256_of(model_path),
        )
        lines = exported(out, model, about, stores)
    print("\n".join([f"{out}: {file_sizes(out)}, made of {model_path}", *lines]))
    if data_dir is None:
        print(f"next: {entrypoint('export', '--data', 'DIR')} compares on listings of your own")
    else:
        print("next: code/examples/serve.py answers with it and without torch; its first lines say how")


def exported(out: Path, model: ItemModel, about: Card, stores: list[ItemStore]) -> list[str]:
    """Write and compare; lines on what was found."""
    settings = stores[0].settings
    batch = batch_size(DataSettings(), settings, CPU)
    found: list[str] = []

    def check(path: Path) -> None:
        progress.update()
        encoder = OnnxEncoder(path)
        compared = [(store, [*store.items]) for store in stores]
        largest = max(
            largest_difference(encoder, model, store, [ids[:1], *cut(ids[1:], batch)]) for store, ids in compared
        )
        progress.update()
        count = sum(len(ids) for _, ids in compared)
        found.append(f"parity: {count} listings, largest difference from torch {largest:.1e} (limit {LIMIT:.0e})")
        store, ids = compared[-1]
        found.extend(speed.line() for speed in speeds(encoder, model, store, ids, batch, progress))

    with tqdm(total=3 + TURNS * (1 + (batch > 1)), desc="export", unit="step", disable=None) as progress:
        graph = trace(model, settings, stores[0].batch([*stores[0].items][:3]))
        progress.update()
        write(out, graph, about, check)
    return found


def speeds(
    encoder: OnnxEncoder, model: ItemModel, store: ItemStore, ids: list[str], batch: int, progress: "tqdm[Any]"
) -> list[Speed]:
    """Of whole batches, and of one listing at a time."""
    whole = cut(ids, batch)
    alone = cut(ids[:ALONE], 1)
    return [measure(encoder, model, store, each, progress) for each in ([whole, alone] if batch > 1 else [alone])]


def made_store(folder: Path, card: ModelCard) -> ItemStore:
    """Made listings."""
    return open_store(made_items(folder, card.settings.image.size), folder, card.settings, card.open_tokenizer(), 0)


def split_store(data_dir: Path, split: str, card: ModelCard, count: int) -> ItemStore:
    """The first listings of a split. UserError when there are none."""
    path = given(item_file(data_dir, split))
    items = read_items(path)
    if not items:
        raise UserError(f"{path}: no items; it needs one line an item")
    chosen = dict(list(items.items())[:count])
    return open_store(chosen, data_dir, card.settings, card.open_tokenizer(), 0)


def file_sizes(out: Path) -> str:
    """Of the file, and of the weights beside it if there are any."""
    size = out.stat().st_size
    with suppress(FileNotFoundError):
        return f"{size / 2**20:,.1f} MiB and {data_of(out).stat().st_size / 2**20:,.1f} MiB in {data_of(out).name}"
    return f"{size / 2**20:,.1f} MiB"
