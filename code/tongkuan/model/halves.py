"""Beyond autocast: residual sums of 16 bits, and blocks compiled one by one.

Autocast rounds what is multiplied and leaves norms at 32 bits, and with them all sums between the layers: half of what
a GPU moves to and from its memory in a Swin or a BERT. `bf16-residual` has norms give 16 bits; what they sum, they sum
at 32 still. `bf16-compiled` also has torch.compile write kernels of its own for what lies between the products.
"""

import os
import shutil
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from tongkuan.base.errors import UserError
from tongkuan.model.trunk import ItemModel

COMPILERS = ("cc", "gcc", "clang")
GRAPHS = 64  # at most, of the code that all blocks of an encoder share


class HalvedNorm(nn.LayerNorm):
    """A norm that gives the type that autocast multiplies; outside of autocast, a norm like others."""

    def forward(self, input: Tensor) -> Tensor:
        """As nn.LayerNorm."""
        kind = input.device.type
        if not torch.is_autocast_enabled(kind):
            return super().forward(input)
        dtype = torch.get_autocast_dtype(kind)
        weight, bias = (None if each is None else each.to(dtype) for each in (self.weight, self.bias))
        with torch.autocast(kind, enabled=False):
            return layer_norm(input.to(dtype), self.normalized_shape, weight, bias, self.eps)


def arrange(model: nn.Module, precision: str) -> None:
    """Have the encoders compute as a precision says that is more than autocast; twice is no more than once."""
    if not isinstance(model, ItemModel) or precision not in ("bf16-residual", "bf16-compiled"):
        return
    halve_norms(model)
    if precision == "bf16-compiled":
        compile_blocks(model)


def parts_of(model: ItemModel) -> Iterator[nn.Module]:
    """All modules of the encoders."""
    for encoder in (*model.encoders("text"), *model.encoders("image")):
        yield from encoder.modules()


def halve_norms(model: ItemModel) -> None:
    """Have the encoders' norms over the last axis be HalvedNorm."""
    from timm.layers.norm import LayerNorm  # of the same forward; timm has others, which turn axes first

    for module in parts_of(model):
        if type(module) in (nn.LayerNorm, LayerNorm):
            module.__class__ = HalvedNorm


def check_compiler(device: torch.device) -> None:
    """UserError on a CPU, where compiling takes longer than it saves, and without a C compiler, which torch's calls."""
    if device.type != "cuda":
        raise UserError("precision bf16-compiled is for a GPU; use one, or begin again at fp32")
    named = os.environ.get("CC")
    if not any(map(shutil.which, [named] if named else COMPILERS)):
        what = f"CC={named} is none" if named else f"none of {', '.join(COMPILERS)} is there"
        raise UserError(f"precision bf16-compiled needs a C compiler, and {what}; install one, or use bf16-residual")


def compile_blocks(model: ItemModel, compiler: str = "inductor") -> None:
    """Have BERT's layers and Swin's blocks compiled when they are first run: those of one kind share a graph.

    For any number of pictures and any length of texts, so that a last batch compiles nothing anew.
    """
    from timm.models.swin_transformer import SwinTransformerBlock
    from transformers.modeling_layers import GradientCheckpointingLayer

    torch._dynamo.config.recompile_limit = GRAPHS
    for module in parts_of(model):
        if isinstance(module, SwinTransformerBlock | GradientCheckpointingLayer) and not module._compiled_call_impl:
            module.compile(backend=compiler, dynamic=True)
