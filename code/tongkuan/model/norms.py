"""Batch norms folded into the convolutions before them: they are fixed numbers by channel, in learning too.

A norm of its own reads and writes every number once more, a quarter of the time of a small convolutional network on a
CPU. Gradients of its weights come by the convolution's. The numbers are those of both up to rounding.
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from timm.layers.conv2d_same import Conv2dSame, conv2d_same
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.functional import conv2d

from tongkuan.model.depthwise import FAST, Depthwise, Side, cuts
from tongkuan.model.kept import Keeps


class FoldedConv(Keeps, nn.Conv2d):
    """A convolution that also does what the norm after it would."""

    norms: "tuple[FoldedNorm]"
    """The norm; in a tuple, since a module would be counted as a part."""

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Conv2d's, then normalised: float (N, C, H, W)."""
        norm = self.norms[0]
        if not norm.folds():
            return self.convolve(x, self.weight, self.bias)
        given = [*self.parameters(recurse=False), *norm.parameters(recurse=False), *norm.buffers(recurse=False)]
        weight, bias = self.keep(given, autocast_dtype(x.device), self.folded)
        if self.learns_alone(x):
            found: Tensor = Depthwise.apply(x, weight, bias, self.convolve, self.sides(x))
            return found
        return self.convolve(x, weight, bias)

    def learns_alone(self, x: Tensor) -> bool:
        """Whether gradients come by model/depthwise.py."""
        is_depthwise = self.groups == self.in_channels == self.out_channels and self.dilation == (1, 1)
        pads_zeros = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        is_plain = x.device.type == "cpu" and x.dtype == torch.float32 and autocast_dtype(x.device) is None
        is_slow = self.kernel_size[1] > FAST or isinstance(self, FoldedSame)
        is_learning = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return (
            is_depthwise and pads_zeros and is_plain and is_slow and is_learning and cuts(self.sides(x), x, self.weight)
        )

    def sides(self, x: Tensor) -> tuple[Side, ...]:
        """How rows and columns are padded."""
        assert not isinstance(self.padding, str)
        return tuple(Side(stride, padding, 0) for stride, padding in zip(self.stride, self.padding, strict=True))

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """By given weights."""
        found: Tensor = self._conv_forward(x, weight, bias)
        return found

    def folded(self) -> tuple[Tensor, Tensor]:
        """(weight, bias) of the convolution and the norm in one; the weight as autocast would have it."""
        norm = self.norms[0]
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        mean = norm.running_mean if self.bias is None else norm.running_mean - self.bias
        weight = self.weight * scale.view(-1, 1, 1, 1)
        return weight.to(autocast_dtype(weight.device) or weight.dtype), norm.bias - mean * scale


class FoldedSame(FoldedConv, Conv2dSame):
    """timm's convolution that pads by the size of the picture, mostly more on one side than on the other.

    timm copies the picture into a larger one. For encoding, and where model/depthwise.py has the gradients, both sides
    are padded alike, by so much that the places wanted are among those that come out, and these are copied: sides
    differ where there are strides, so they are few.
    """

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As in FoldedConv."""
        if torch.is_grad_enabled() or torch.onnx.is_in_onnx_export():  # the backward of more places takes longer
            options: Any = (self.stride, self.padding, self.dilation, self.groups)
            padded: Tensor = conv2d_same(x, weight, bias, *options)
            return padded
        padding, first, last = zip(*self.same_paddings(x), strict=True)
        found = conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)
        if (*first, *last) == (0, 0, *found.shape[2:]):
            return found
        return found[:, :, first[0] : last[0], first[1] : last[1]].contiguous(memory_format=torch.channels_last)

    def same_paddings(self, x: Tensor) -> list[tuple[int, int, int]]:
        """`same_padding` of rows and of columns."""
        sides = zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True)
        return [same_padding(*each) for each in sides]

    def sides(self, x: Tensor) -> tuple[Side, ...]:
        """As in FoldedConv."""
        found = zip(self.stride, self.same_paddings(x), strict=True)
        return tuple(Side(stride, padding, first) for stride, (padding, first, _) in found)


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int, int]:
    """(padding of either side, the first place that is wanted, one after the last) of a side of `size` pixels."""
    wanted = math.ceil(size / stride)
    total = max((wanted - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    before = total // 2
    first = math.ceil((total - 2 * before) / stride)
    return before + first * stride, first, first + wanted


class FoldedNorm(nn.BatchNorm2d):
    """A norm whose work the convolution before it has done."""

    is_folded = True

    def folds(self) -> bool:
        """Whether it has; an exported graph has both, and whoever reads it folds them."""
        return self.is_folded and not self.training and not torch.onnx.is_in_onnx_export()

    def forward(self, x: Tensor) -> Tensor:
        """As without folding."""
        return self.rest(x) if self.folds() else super().forward(x)

    def rest(self, x: Tensor) -> Tensor:
        """What the module does beside normalising."""
        return x


class FoldedNormAct(FoldedNorm, BatchNormAct2d):
    """timm's norm with an activation."""

    def rest(self, x: Tensor) -> Tensor:
        """The activation."""
        activated: Tensor = self.act(self.drop(x))
        return activated


CONVOLUTIONS: dict[type, type[FoldedConv]] = {nn.Conv2d: FoldedConv, Conv2dSame: FoldedSame}
NORMS: dict[type, type[FoldedNorm]] = {nn.BatchNorm2d: FoldedNorm, BatchNormAct2d: FoldedNormAct}


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """To which autocast rounds what it multiplies; None without it."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def fold_norms(encoder: nn.Module, size: int) -> None:
    """Fold every batch norm of a timm encoder for pictures of `size` pixels that alone reads a convolution's output."""
    for convolution, norm in [*alone(encoder, size)]:
        convolution.norms = (norm,)
        convolution.__class__ = CONVOLUTIONS[type(convolution)]
        norm.__class__ = NORMS[type(norm)]


def alone(encoder: nn.Module, size: int) -> Iterator[tuple[Any, Any]]:
    """Each convolution and the norm that alone reads what it makes, as the forward of a blank picture shows."""
    made: list[tuple[Any, Tensor]] = []
    read: list[tuple[Any, Tensor]] = []
    norms = [module for module in encoder.modules() if type(module) in NORMS]
    convolutions = [module for module in encoder.modules() if norms and type(module) in CONVOLUTIONS]
    hooks = [
        *(norm.register_forward_pre_hook(lambda norm, given: read.append((norm, given[0]))) for norm in norms),
        *(each.register_forward_hook(lambda each, _, found: made.append((each, found))) for each in convolutions),
    ]
    outcome, was_training = None, encoder.training
    try:
        with torch.enable_grad():
            outcome = encoder.eval()(torch.zeros(1, 3, size, size)) if norms else None
    except (ArithmeticError, RuntimeError, AssertionError):
        return  # pictures of a size that it cannot take: whoever gives it one is told
    finally:
        encoder.train(was_training)
        for hook in hooks:
            hook.remove()
    calls, readers = Counter(module for module, _ in (*made, *read)), readers_of(outcome)
    for convolution, found in made:
        norm: Any = next((norm for norm, given in read if given is found), None)
        is_alone = readers[found.grad_fn] == 1 and calls[convolution] == calls[norm] == 1
        if is_alone and norm.weight is not None and norm.running_var is not None:
            yield convolution, norm


def readers_of(outcome: Tensor | None) -> Counter[Any]:
    """How many operators read what each operator made, of those that the outcome depends on."""
    readers: Counter[Any] = Counter()
    waiting: list[Any] = [outcome.grad_fn] if outcome is not None else []
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None:
                if node not in readers:
                    waiting.append(node)
                readers[node] += 1
    return readers
