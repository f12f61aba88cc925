"""A model as an ONNX graph: what torch computes on tensors, from bytes of pictures to embeddings [p ; q]."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tongkuan.base.errors import FailureError, clip, is_out_of_memory
from tongkuan.encode.store import Batch, normalised
from tongkuan.export import protobuf
from tongkuan.export.encoder import EMBEDDINGS, PICTURES, TOKENS, WORDS
from tongkuan.model.trunk import ItemModel
from tongkuan.settings import ModelSettings

OPSET = 18  # the first with ReduceSum, ScatterElements and BitwiseAnd as used here
AXES = {**dict.fromkeys(PICTURES, ()), **dict.fromkeys(TOKENS, ("tokens",)), **dict.fromkeys(WORDS, ("words",))}
"""Axes of each input, beside that of the batch, whose length varies."""
# Of onnx.proto.
GRAPH, GRAPH_OUTPUT, GRAPH_INPUT, INPUT_NAME = 7, 12, 11, 1


@dataclass(frozen=True, slots=True)
class OnnxGraph:
    """A graph without its weights."""

    before: bytes
    """Fields of the ModelProto but for the graph."""
    graph: bytes
    """The GraphProto."""
    weights: dict[str, Tensor]
    """By their name in the graph, in its order: on the CPU, float32 or int64."""


class Graph(nn.Module):
    """A model with what precedes it: uint8 pictures are normalised, inputs that it does not read are left out."""

    def __init__(self, model: ItemModel, settings: ModelSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def forward(self, *tensors: Tensor) -> Tensor:
        """Tensors as `tensors_of` has them -> embeddings, float32 (N, 2D)."""
        named = dict(zip(inputs_of(self.settings), tensors, strict=True))
        count = tensors[0].shape[0]
        nothing = torch.zeros(count, 1, dtype=torch.int64)
        ids, mask = (named.get(name, nothing) for name in TOKENS)
        images = torch.zeros(count, 3, 1, 1)
        if "images" in named:
            images = normalised(Batch(named["images"], named["has_image"], ids, mask), self.settings.image)
        embeddings: Tensor = self.model(images, ids, mask, *(named[name] for name in WORDS if name in named))
        return embeddings.float().reshape(count, 2 * self.settings.embedding_size)


def inputs_of(settings: ModelSettings) -> tuple[str, ...]:
    """Names of what a model reads."""
    reads_words = settings.towers == "one" and settings.part_sizes()["words"] > 0
    asked = ((PICTURES, settings.inputs != "text"), (TOKENS, settings.has_text), (WORDS, reads_words))
    return tuple(name for names, is_read in asked if is_read for name in names)


def tensors_of(batch: Batch, settings: ModelSettings) -> tuple[Tensor, ...]:
    """What a model reads of a batch, in the order of `inputs_of`."""
    named = dict(zip((*PICTURES, *TOKENS), (batch.images, batch.has_image, batch.ids, batch.mask), strict=True))
    named |= zip(WORDS, batch.words, strict=False)
    return tuple(named[name] for name in inputs_of(settings))


def trace(model: ItemModel, settings: ModelSettings, batch: Batch) -> OnnxGraph:
    """The graph of a model in evaluation mode on the CPU, which is left without gradients; `batch` is of some items.

    By torch's exporter of traces: the one that takes its place wants three more packages, and minutes for what this
    does in seconds. What it gets wrong, the comparison with torch shows. FailureError when it cannot export the model.
    """
    traced = Graph(model, settings).requires_grad_(False)
    names, tensors = inputs_of(settings), tensors_of(batch, settings)
    varying = {name: dict(enumerate(("batch", *AXES[name]), 0)) for name in names}
    file = io.BytesIO()
    try:
        with torch.no_grad(), quiet():
            traced(*tensors)  # so that the model's constants are made outside the trace
            torch.onnx.export(
                traced,
                tensors,
                file,  # type: ignore[arg-type]  # which it writes to as well as to a path
                export_params=False,
                # Either would put weights without a name in the place of ours. The runtime does both when it loads.
                do_constant_folding=False,
                training=torch.onnx.TrainingMode.PRESERVE,
                input_names=list(names),
                output_names=[EMBEDDINGS],
                opset_version=OPSET,
                dynamic_axes={**varying, EMBEDDINGS: {0: "batch"}},
                dynamo=False,
            )
        return taken_apart(file.getvalue(), names, traced.state_dict())
    except Exception as error:  # torch's exporter raises all sorts
        if is_out_of_memory(error):
            raise
        reason = clip(str(error).strip().partition("\n")[0], 160)
        raise FailureError(f"torch cannot export these encoders as ONNX ({reason}); train with others") from error


def taken_apart(data: bytes, names: tuple[str, ...], state: dict[str, Tensor]) -> OnnxGraph:
    """The graph of a ModelProto in which weights are inputs too: from it they go."""
    fields = list(protobuf.split(data))
    graph = next(content for tag, _, content in fields if tag == GRAPH)
    kept, weights = bytearray(), []
    for tag, whole, content in protobuf.split(graph):
        name = name_of(content) if tag == GRAPH_INPUT else ""
        if name and name not in names:
            weights.append(name)
        else:
            kept += whole
    before = b"".join(whole for tag, whole, _ in fields if tag != GRAPH)
    return OnnxGraph(before, bytes(kept), {name: state[name].contiguous() for name in weights})


def name_of(value_info: bytes) -> str:
    """The name in a ValueInfoProto."""
    return next(content for tag, _, content in protobuf.split(value_info) if tag == INPUT_NAME).decode()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what the exporter has to say to programmers off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
