"""Swin with less to move: one table of biases and masks for all pictures, and pixels that stay where windows have them.

For encoding. timm makes the table anew in each forward and repeats it for each picture. At 384 pixels the copies are
larger than queries, keys and values together, and fused attention only spares the table of scores. With windows placed
beside heads, all pictures read one table, which is kept from batch to batch.

For learning, too. timm rolls a picture, cuts it into windows, puts it together and rolls it back in each block. But all
that a block does outside its attention is done pixel by pixel, in whatever order. So pixels are put into the order of a
block's windows, and from there into that of the next block's: one copy where there were four.

The numbers are timm's, to the bit on a CPU.
"""

import functools
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformerBlock, SwinTransformerStage, WindowAttention, window_partition
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tongkuan.model.kept import Keeps


class FoldedWindows(Keeps, WindowAttention):
    """timm's attention in windows, of the same weights; learning and exporting go timm's way."""

    def folds(self) -> bool:
        """Whether windows are folded: where a table may be kept, since nothing learns from it."""
        return self.fused_attn and not (self.training or torch.is_grad_enabled() or torch.onnx.is_in_onnx_export())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """As timm's: x float (pictures x windows, area, width), mask float (windows, area, area) or None."""
        if not self.folds():
            plain: Tensor = super().forward(x, mask)
            return plain
        rows, area, width = x.shape
        windows = len(mask) if mask is not None else 1
        qkv = self.qkv(x).view(rows // windows, windows, area, 3, self.num_heads, -1).permute(3, 0, 1, 4, 2, 5)
        query, key, value = qkv.flatten(2, 3).unbind(0)  # (pictures, windows x heads, area, head's width) each
        dropout = self.attn_drop.p if self.training else 0.0
        found = scaled_dot_product_attention(query, key, value, self.table(mask, query.dtype), dropout)
        # Not by `view`: some of a GPU's kernels lay their result out with pixels before windows and heads.
        found = found.unflatten(1, (windows, self.num_heads)).transpose(2, 3).reshape(rows, area, width)
        projected: Tensor = self.proj_drop(self.proj(found))
        return projected

    def table(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Biases of positions and what other windows' pixels are masked by, (1, windows x heads, area, area)."""
        shape = None if mask is None else mask.shape
        table: Tensor = self.keep([self.relative_position_bias_table], (shape, dtype), lambda: self.made(mask, dtype))
        return table

    def made(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The table, of the weights as they are."""
        table: Tensor = self._get_rel_pos_bias()
        if mask is not None:
            table = table + mask.unsqueeze(1)
        return table.to(dtype).flatten(0, 1).unsqueeze(0)


Layout = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Sides of a picture, of a window, and by how much windows are shifted: pixels."""


def pixels_of(layout: Layout) -> Tensor:
    """int64 (pixels,): of each place in one window after the other, which pixel of the picture is there, row by row."""
    sides, window, (down, right) = layout
    pixels = torch.arange(sides[0] * sides[1]).view(1, *sides, 1)
    return window_partition(pixels.roll((-down, -right), (1, 2)), window).flatten()


@functools.cache  # copying numbers to a GPU has the host wait for it
def between(before: Layout | None, after: Layout | None, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Where each pixel of one order is found in the other, there and back; None where they are the same.

    An order is that of windows, or None: row by row.
    """
    layout = before or after
    if layout is None:
        return None
    with torch.inference_mode(False):
        rows = torch.arange(layout[0][0] * layout[0][1])
        source, target = (rows if each is None else pixels_of(each) for each in (before, after))
        if torch.equal(source, target):
            return None
        return source.argsort()[target].to(device), target.argsort()[source].to(device)


class Reordered(torch.autograd.Function):
    """Rows picked by an order that has each once; the gradient is picked by the reverse, where torch's own adds up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: Tensor, back: Tensor) -> Tensor:
        """Rows float (N, P, C), orders int64 (P,)."""
        ctx.back = back
        return rows.index_select(1, there)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Of the rows."""
        return gradients[0].index_select(1, ctx.back), None, None


class FoldedBlock(SwinTransformerBlock):
    """timm's block, which also takes pixels that lie in the order of its windows, and leaves them there."""

    def forward(self, x: Tensor) -> Tensor:
        """Float (N, H, W, C) as timm's, or (N, pixels, C) in the order of the windows."""
        if torch.onnx.is_in_onnx_export() or x.dim() == 4:  # in this order: an export counts what is asked of x
            plain: Tensor = super().forward(x)
            return plain
        windows = self.norm1(x).view(-1, self.window_area, x.shape[-1])
        x = x + self.drop_path1(self.attn(windows, mask=self.attn_mask).view_as(x))
        added: Tensor = x + self.drop_path2(self.mlp(self.norm2(x)))
        return added

    def layout(self) -> Layout:
        """How its windows lie."""
        places: Any = (self.input_resolution, self.window_size, self.shift_size)  # lists, some callers of timm's
        sides, window, shift = map(tuple, places)
        return sides, window, shift


class FoldedStage(SwinTransformerStage):
    """timm's stage, of the same weights, with pixels in the order of windows from block to block."""

    is_folded = True

    def own_blocks(self) -> list[FoldedBlock]:
        """In their order."""
        return [*self.blocks]

    def folds(self, x: Tensor) -> bool:
        """Whether pixels of a picture (N, H, W, C) can keep that order: where windows cut it evenly."""
        if not self.is_folded or self.grad_checkpointing or torch.onnx.is_in_onnx_export():
            return False
        if tuple(x.shape[1:3]) != tuple(self.input_resolution) or any(
            block.dynamic_mask for block in self.own_blocks()
        ):
            return False
        sides, window, _ = self.own_blocks()[0].layout()
        return all(side % length == 0 for side, length in zip(sides, window, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """As timm's: float (N, H, W, C) -> (N, H', W', C')."""
        if not self.folds(x):
            plain: Tensor = super().forward(x)
            return plain
        x = self.downsample(x)
        pixels, layout = x.flatten(1, 2), None
        for block in self.own_blocks():
            pixels = block(reordered(pixels, layout, block.layout()))
            layout = block.layout()
        return reordered(pixels, layout, None).view_as(x)


def reordered(pixels: Tensor, before: Layout | None, after: Layout | None) -> Tensor:
    """Pixels float (N, pixels, C) put from one order into another."""
    orders = between(before, after, pixels.device)
    if orders is None:
        return pixels
    moved: Tensor = Reordered.apply(pixels, *orders) if torch.is_grad_enabled() else pixels.index_select(1, orders[0])
    return moved


FOLDED: dict[type[nn.Module], type[nn.Module]] = {
    WindowAttention: FoldedWindows,
    SwinTransformerBlock: FoldedBlock,
    SwinTransformerStage: FoldedStage,
}


def fold_windows(encoder: nn.Module) -> None:
    """Have a timm encoder's stages, blocks and attention in windows be folded ones."""
    for module in encoder.modules():
        module.__class__ = FOLDED.get(type(module), type(module))
