"""An ONNX file: a graph with its weights and its card, whole or not at all.

One file holds all, but for models of more than 2 GB, which protobuf cannot hold: their weights lie beside it, in
NAME.onnx.data.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from tongkuan.base.files import publish
from tongkuan.export.encoder import CARD_KEY, Card
from tongkuan.export.graph import GRAPH, OnnxGraph
from tongkuan.export.protobuf import Value, field, head, message

LARGEST = (1 << 31) - (1 << 26)  # bytes of weights in one file; a protobuf has at most 2^31 - 1
ALIGNED = 4096  # bytes: a weight that begins a page can be mapped
# Of onnx.proto.
INITIALIZER, METADATA = 5, 14
DIMENSION, DATA_TYPE, NAME, RAW_DATA, EXTERNAL_DATA, DATA_LOCATION = 1, 2, 8, 9, 13, 14
KEY, VALUE, EXTERNAL = 1, 2, 1
TYPES = {torch.float32: 1, torch.int64: 7}


def data_of(path: Path) -> Path:
    """Where the weights of a large model lie."""
    return path.with_name(f"{path.name}.data")


def write(path: Path, made: OnnxGraph, card: Card, check: Callable[[Path], None]) -> None:
    """Publish a graph, once `check` has run on it. What `check` raises leaves nothing behind.

    The same graph and card give the same bytes.
    """
    data = data_of(path)
    if sum(map(size_of, made.weights.values())) <= LARGEST:
        with publish(path) as file:
            write_model(file, made, card, None)
            check(Path(file.name))
        data.unlink(missing_ok=True)
        return
    path.unlink(missing_ok=True)  # until the weights that it speaks of are there
    with ExitStack() as undo:
        with publish(data) as file:
            write_weights(file, made)
        undo.callback(data.unlink)
        with publish(path) as file:
            write_model(file, made, card, data.name)
            check(Path(file.name))
        undo.pop_all()


def write_model(file: IO[Any], made: OnnxGraph, card: Card, data_name: str | None) -> None:
    """A ModelProto; with `data_name` its weights are there, as write_weights puts them."""
    heads, start = [], 0
    for name, weight in made.weights.items():
        heads.append(tensor_head(name, weight, data_name, start))
        start += aligned(size_of(weight))
    bodies = 0 if data_name else sum(map(size_of, made.weights.values()))
    file.write(made.before + field(METADATA, message([(KEY, CARD_KEY.encode()), (VALUE, card.dumps().encode())])))
    file.write(head(GRAPH, len(made.graph) + sum(map(len, heads)) + bodies) + made.graph)
    for beginning, weight in zip(heads, made.weights.values(), strict=True):
        file.write(beginning)
        if not data_name:
            file.write(weight.numpy())
    file.flush()


def tensor_head(name: str, weight: Tensor, data_name: str | None, start: int) -> bytes:
    """An initializer up to where the bytes of its weight follow, or the whole of it when they lie elsewhere."""
    fields: list[tuple[int, Value]] = [(DIMENSION, size) for size in weight.shape]
    fields += [(DATA_TYPE, TYPES[weight.dtype]), (NAME, name.encode())]
    if data_name:
        place = {"location": data_name, "offset": str(start), "length": str(size_of(weight))}
        pairs = [message([(KEY, key.encode()), (VALUE, value.encode())]) for key, value in place.items()]
        fields += [*((EXTERNAL_DATA, pair) for pair in pairs), (DATA_LOCATION, EXTERNAL)]
        return field(INITIALIZER, message(fields))
    inside = message(fields) + head(RAW_DATA, size_of(weight))
    return head(INITIALIZER, len(inside) + size_of(weight)) + inside


def write_weights(file: IO[Any], made: OnnxGraph) -> None:
    """All weights, each from the beginning of a page on."""
    for weight in made.weights.values():
        file.write(weight.numpy())
        file.write(bytes(aligned(size_of(weight)) - size_of(weight)))


def size_of(weight: Tensor) -> int:
    """Bytes."""
    return weight.numel() * weight.element_size()


def aligned(size: int) -> int:
    """Bytes with those up to the next page."""
    return -(-size // ALIGNED) * ALIGNED
