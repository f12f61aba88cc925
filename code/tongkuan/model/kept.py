"""What a network makes of its weights, kept from batch to batch while nothing learns."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn


class Keeps(nn.Module):
    """A module with one such thing, made anew when the weights are others."""

    kept: tuple[Hashable, Any] | None = None
    """What it was made of, and the thing."""

    def keep(self, weights: Sequence[Tensor], more: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gave for these weights and `more`; made anew where gradients or a compiler must see how."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        if any(each.is_inference() for each in weights):
            return make()  # nothing tells whether they have changed
        made_of = (*((each.data_ptr(), each._version, each.device) for each in weights), more)
        kept = self.kept
        if kept is None or kept[0] != made_of:
            with torch.inference_mode(False), torch.no_grad():
                kept = made_of, make()
            self.kept = kept  # at once: other threads compute by this module too
        return kept[1]

    def train(self, mode: bool = True) -> Self:
        """As nn.Module's; what is kept is no use to what learns."""
        self.kept = None
        return super().train(mode)
