"""Changes to training items, drawn by their place in the global batch: the same on any number of ranks and parts."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tongkuan.settings import Augmentation


def augment(
    images: Tensor,
    mask: Tensor,
    settings: Augmentation,
    seed: int,
    step: int,
    rows: Sequence[int],
    batch: int,
    max_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Changed images (N, 3, S, S) and mask (N, T) of the items `rows` of a global batch of `batch` items.

    What happens to a row depends on seed, step and its place in the global batch alone: not on ranks, nor on how far
    its part is padded (T is max_tokens at most), nor on whether the run was interrupted.
    """
    draws = np.random.default_rng((seed, step, 1)).random((batch, 8), dtype=np.float32)[list(rows)]
    chance = torch.from_numpy(draws).to(images.device, non_blocking=True)
    if settings.crop or settings.flip:
        scale = 1 - settings.crop * chance[:, 0:2]
        shift = (1 - scale) * (2 * chance[:, 2:4] - 1)
        mirror = torch.where(chance[:, 4] < settings.flip, -1.0, 1.0)
        theta = torch.zeros(len(rows), 2, 3, device=images.device)
        theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale[:, 0] * mirror, scale[:, 1], shift
        grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
        images = functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    if settings.color:
        change = settings.color * (2 * chance[:, 5:7] - 1)
        images = images * (1 + change[:, 0, None, None, None]) + change[:, 1, None, None, None]
    if settings.drop_image:
        images = images * (chance[:, 7] >= settings.drop_image).view(-1, 1, 1, 1)
    if settings.drop_text:
        draws = np.random.default_rng((seed, step, 2)).random((batch, max_tokens - 1), dtype=np.float32)
        keep = draws[list(rows), : mask.shape[1] - 1] >= settings.drop_text
        kept = torch.from_numpy(keep).to(mask.device, non_blocking=True)
        mask = torch.cat([mask[:, :1], mask[:, 1:] * kept], dim=1)  # [CLS] stays: its output is the text
    return images, mask
