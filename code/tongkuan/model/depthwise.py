"""Depthwise convolutions that learn on a CPU: kernels of five columns in a third of the time.

oneDNN has a fast way to the gradient of a depthwise kernel of up to three columns. Of one of five it takes ten times as
long as the convolution itself, 7 % of a step of an EfficientNet-Lite0; so three columns at a time are a kernel of their
own. And where one side of a picture is padded more than the other, the picture is not copied into a larger one, on the
way back as on the way there. The numbers are those of torch up to rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

FAST = 3  # columns


class Side(NamedTuple):
    """Rows or columns of a convolution, which pads both ends alike and leaves the first places out."""

    stride: int
    padding: int
    first: int
    """Of the places, the one that is wanted first."""


class Piece(NamedTuple):
    """Part of a kernel's rows or columns at some of the places."""

    kernel: slice
    places: slice
    before: int
    """Pixels met before the picture's first; negative where so many are not met."""
    after: int


def cuts(sides: Sequence[Side], x: Tensor, weight: Tensor) -> bool:
    """Whether each piece of a kernel meets some of the picture's pixels."""
    columns = sides[1]
    is_smaller = all(one >= other for one, other in zip(x.shape[2:], weight.shape[2:], strict=True))
    return is_smaller and columns.padding - columns.first * columns.stride < FAST


class Depthwise(torch.autograd.Function):
    """A convolution of x (N, C, H, W) by weight (C, 1, K, L) and bias (C,), without dilation."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, convolve: Callable[..., Tensor], sides: tuple[Side, Side]
    ) -> Tensor:
        """What `convolve` gives of the three."""
        ctx.save_for_backward(x, weight)
        ctx.sides = sides
        return convolve(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of the picture, and of the kernel."""
        given = (gradient, *ctx.saved_tensors, ctx.sides)
        of_x = of_picture(*given) if ctx.needs_input_grad[0] else None
        return of_x, *(of_kernel(*given) if any(ctx.needs_input_grad[1:]) else (None, None)), None, None


def of_picture(gradient: Tensor, x: Tensor, weight: Tensor, sides: tuple[Side, Side]) -> Tensor:
    """The gradient of x; places that were left out have none."""
    margins: list[int] = []
    for axis, side in enumerate(sides, 2):
        places = (x.shape[axis] + 2 * side.padding - weight.shape[axis]) // side.stride + 1
        margins = [side.first, places - side.first - gradient.shape[axis], *margins]
    whole, padding = pad(gradient, margins) if any(margins) else gradient, [side.padding for side in sides]
    return gradients(whole, x, weight, sides, padding, [True, False, False])[0]


def of_kernel(gradient: Tensor, x: Tensor, weight: Tensor, sides: tuple[Side, Side]) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias."""
    of_weight, of_bias = torch.zeros_like(weight), weight.new_zeros(len(weight))
    sizes = zip(sides, x.shape[2:], weight.shape[2:], gradient.shape[2:], (weight.shape[2], FAST), strict=True)
    for rows, columns in product(*(pieces(*each) for each in sizes)):
        above, beside = (max(0, each.before) if each.before == each.after else 0 for each in (rows, columns))
        margins = (columns.before - beside, columns.after - beside, rows.before - above, rows.after - above)
        met, there = pad(x, margins) if any(margins) else x, gradient[:, :, rows.places, columns.places]
        part = of_weight[:, :, rows.kernel, columns.kernel]
        found = gradients(there, met, part, sides, (above, beside), [False, True, True])
        part += found[1]
        of_bias += found[2] if columns.kernel.start == 0 else 0
    return of_weight, of_bias


def pieces(side: Side, size: int, kernel: int, places: int, fast: int) -> Iterator[Piece]:
    """A side of `size` pixels: at most `fast` of the kernel at all places, or all of it within, then at the end."""
    before = side.padding - side.first * side.stride
    within = max(0, min(places, (size + 2 * before - kernel) // side.stride + 1))
    parts = [(start, min(start + fast, kernel), 0, places) for start in range(0, kernel, fast)]
    if kernel <= fast:
        parts = [(0, kernel, *span) for span in ((0, within), (within, places)) if span[0] < span[1]]
    for start, stop, begin, end in parts:
        above = before - start - begin * side.stride
        below = (end - 1) * side.stride + stop - before - size
        is_alike = above >= 0 and above - side.stride < below <= above  # padded so, as many places come out
        yield Piece(slice(start, stop), slice(begin, end), above, above if is_alike else below)


def gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, sides: tuple[Side, Side], padding: Any, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, weight and bias, those that are wanted."""
    strides, channels = [side.stride for side in sides], len(weight)
    options = ([channels], strides, padding, (1, 1), False, (0, 0), channels, wanted)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(gradient, x, weight, *options)
    return found
