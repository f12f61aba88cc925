"""Swin's attention for encoding: one table of biases and masks for all pictures, and kept from batch to batch.

timm makes that table anew in each forward and repeats it for each picture. At 384 pixels the copies are larger than
queries, keys and values together, and fused attention only spares the table of scores. With windows placed beside
heads, all pictures read one table. The numbers are timm's, to the bit on a CPU.
"""

import torch
from timm.models.swin_transformer import WindowAttention
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
        found = found.view(rows, self.num_heads, area, -1).transpose(1, 2).reshape(rows, area, width)
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


def fold_windows(encoder: nn.Module) -> None:
    """Have a timm encoder's attention in windows be FoldedWindows."""
    for module in encoder.modules():
        if type(module) is WindowAttention:
            module.__class__ = FoldedWindows
