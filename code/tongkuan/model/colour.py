"""What colours a picture shows, counted: nothing is learned here.

Two accounts. Of the object alone: CIELAB over pixels weighted by their distance from the border's colour, for pictures
on plain ground. Of everything, and of the middle: hue, saturation and value, for pictures whose ground is not plain.
Square roots of shares, so that an inner product is the Bhattacharyya coefficient (Bhattacharyya 1943).
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from tongkuan.model.trunk import constant

SIDE = 32  # pixels that are counted a side
LAB_BINS = (6, 8, 8)
LAB_ENDS = ((0.0, 100.0), (-60.0, 70.0), (-60.0, 80.0))
LAB_SPREAD = (12.8, 8.0, 8.0)  # CIELAB units; a shade is shared among neighbouring bins
BORDER = 2  # pixels; the lower one often cuts through the object and is not looked at
GROUND, SOFTNESS = 12.0, 4.0  # CIELAB units: as far from the ground's colour a pixel counts half
HSV_BINS = (12, 4, 4)
OBJECT_WIDTH = 6 * 8 * 8
WHOLE_WIDTH = 2 * 12 * 4 * 4
TO_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))  # sRGB, D65
WHITE = (0.9505, 1.0, 1.089)


def object_colours(rgb: Tensor) -> Tensor:
    """CIELAB of what is not ground: rgb float (N, 3, S, S) in 0..1 -> float (N, OBJECT_WIDTH)."""
    lab = to_lab(small(rgb))  # (N, 3, SIDE, SIDE)
    sides = (lab[..., :BORDER, :], lab[..., :BORDER], lab[..., -BORDER:])
    border = torch.cat([side.flatten(2) for side in sides], dim=2).sort(dim=2).values  # ONNX knows no median
    ground = border[..., (border.shape[2] - 1) // 2]
    distance = (lab - ground[..., None, None]).square().sum(dim=1).sqrt().flatten(1)  # (N, pixels)
    weight = torch.sigmoid((distance - GROUND) / SOFTNESS)
    shares = [soft_bins(lab[:, axis].flatten(1), axis) for axis in range(3)]  # 3 x (N, pixels, bins)
    weighted = shares[0] * (weight / weight.sum(dim=1, keepdim=True).clamp(min=1e-9)).unsqueeze(2)
    counts = torch.einsum("npa,npb,npc->nabc", weighted, shares[1], shares[2])
    return counts.flatten(1).sqrt()


def whole_colours(rgb: Tensor) -> Tensor:
    """HSV of the picture and of its middle: rgb float (N, 3, S, S) in 0..1 -> float (N, WHOLE_WIDTH)."""
    hsv = to_hsv(small(rgb))
    quarter = SIDE // 4
    return torch.cat([hsv_counts(hsv), hsv_counts(hsv[..., quarter:-quarter, quarter:-quarter])], dim=1)


def small(rgb: Tensor) -> Tensor:
    """SIDE x SIDE pixels, each the mean of what it stands for."""
    if torch.onnx.is_in_onnx_export():
        return pooled_in_order(rgb.float())
    return functional.adaptive_avg_pool2d(rgb.float(), SIDE)


def pooled_in_order(rgb: Tensor) -> Tensor:
    """The bits of adaptive_avg_pool2d on a CPU, of additions that stand in the order in which that makes them.

    A pooling of another runtime sums in an order of its own. A last bit moves a pixel to the next bin of hsv_counts,
    which embeddings show: sqrt(1 / 1024) of a share.
    """
    rows, columns = (windows(side, rgb.device) for side in rgb.shape[2:])
    total = rgb.new_zeros(())
    for (row, is_row), (column, is_column) in itertools.product(rows, columns):
        inside = is_row.unsqueeze(1) & is_column
        total = total + torch.where(inside, rgb[:, :, row][..., column], 0.0)
    heights, widths = (torch.stack([is_there for _, is_there in steps]).sum(dim=0) for steps in (rows, columns))
    return total / heights.unsqueeze(1) / widths


def windows(side: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Step by step into the SIDE windows of an axis: int64 (SIDE,) places, bool (SIDE,) whether still within."""
    starts = [place * side // SIDE for place in range(SIDE)]
    ends = [-(-(place + 1) * side // SIDE) for place in range(SIDE)]
    longest = max(end - start for start, end in zip(starts, ends, strict=True))
    place = torch.arange(SIDE, device=device)  # computed there: a GPU would be waited for to take a list
    first, last = place * side // SIDE, ((place + 1) * side + SIDE - 1) // SIDE
    return [((first + step).clamp(max=side - 1), first + step < last) for step in range(longest)]


def to_lab(rgb: Tensor) -> Tensor:
    """CIELAB under D65 of sRGB in 0..1, (N, 3, H, W)."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    matrix = constant(tuple(number for row in TO_XYZ for number in row), rgb.device).view(3, 3)
    xyz = torch.einsum("ij,njhw->nihw", matrix, linear) / constant(WHITE, rgb.device).view(1, 3, 1, 1)
    root = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = root.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def soft_bins(values: Tensor, axis: int) -> Tensor:
    """Shares of each of the axis' bins in each value: (N, P) -> (N, P, bins), rows sum to 1."""
    (low, high), count = LAB_ENDS[axis], LAB_BINS[axis]
    centres = constant(tuple(low + (high - low) * place / (count - 1) for place in range(count)), values.device)
    return torch.softmax(-0.5 * ((values.unsqueeze(2) - centres) / LAB_SPREAD[axis]).square(), dim=2)


def to_hsv(rgb: Tensor) -> Tensor:
    """Hue, saturation and value in 0..1 of RGB in 0..1, (N, 3, H, W)."""
    red, green, blue = rgb.unbind(1)
    top, low = rgb.max(dim=1).values, rgb.min(dim=1).values
    spread = (top - low).clamp(min=1e-9)
    hue = torch.where(
        top == red,
        (green - blue) / spread,
        torch.where(top == green, (blue - red) / spread + 2, (red - green) / spread + 4),
    )
    hue = torch.where(top > low, torch.remainder(hue, 6) / 6, torch.zeros_like(hue))
    return torch.stack([hue, (top - low) / top.clamp(min=1e-9), top], dim=1)


def hsv_counts(hsv: Tensor) -> Tensor:
    """Square roots of the shares of HSV bins in (N, 3, H, W): (N, bins)."""
    hue, saturation, value = (
        (hsv[:, axis] * bins).long().clamp(max=bins - 1).flatten(1) for axis, bins in enumerate(HSV_BINS)
    )
    place = (hue * HSV_BINS[1] + saturation) * HSV_BINS[2] + value
    counts = hsv.new_zeros(hsv.shape[0], HSV_BINS[0] * HSV_BINS[1] * HSV_BINS[2])
    return counts.scatter_add_(1, place, hsv.new_ones(place.shape)).div(place.shape[1]).sqrt()
