"""Projections of a part's raw features in which items of one product lie close: Fisher's linear discriminants.

Principal components of the training items, scaled so that what differs within products counts little, then the
directions that still vary most. Within-class covariance normalisation (Hatch et al., Interspeech 2006) of components.

The likeness that weights are learned from is cross-fitted: by projections of other products alone. One that was found
on the pair's own products holds them closer than it would new ones, and a part would weigh more than it is worth.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tongkuan.model.one import Projection

FOLDS = 4
MORE = 2  # components are found for each direction that is kept
SHRINKAGE = 0.3  # of the scatter within products, to a multiple of the unit matrix: there are few items of a product


def folds_of(products: Tensor) -> Tensor:
    """A fold for each item, int64 (items,), by its product's number; a product is in one fold whole."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(int(products.max()) + 1))
    return order[products] % FOLDS


def cross_fitted(
    raw: Tensor, products: Tensor, size: int, whiten: bool, folds: Tensor, left: Tensor, right: Tensor
) -> Tensor:
    """Likeness of each pair by a part, float64 (pairs,), by projections of neither side's product.

    A pair whose sides are in two folds has the mean of two, each of which has not seen one side.
    """
    sums, times = torch.zeros(2, len(left), dtype=torch.float64)
    there = raw.any(dim=1)
    for fold in range(FOLDS):
        seen = there & (folds != fold)
        mean, weight = directions_of(raw[seen], products[seen], size, whiten)
        unit = functional.normalize((raw - mean) @ weight.T, dim=1) * there.unsqueeze(1)
        asked = (folds[left] == fold) | (folds[right] == fold)
        sums[asked] += (unit[left[asked]] * unit[right[asked]]).sum(dim=1)
        times[asked] += 1
    means: Tensor = sums / times
    return means


def set_directions(projection: Projection, raw: Tensor, products: Tensor, size: int, whiten: bool) -> None:
    """The projection that all training items give; items that lack the part have rows of 0."""
    there = raw.any(dim=1)
    mean, weight = directions_of(raw[there], products[there], size, whiten)
    projection.linear.weight.copy_(weight)
    projection.linear.bias.copy_(-weight @ mean)


def directions_of(features: Tensor, products: Tensor, size: int, whiten: bool) -> tuple[Tensor, Tensor]:
    """(mean (W,), weight (size, W)) of discriminants of float64 (N, W), those that vary most first.

    products int64 (N,). Where no product has two items: of the principal components alone. Rows of 0 where fewer are.
    """
    mean, components = components_of(features, MORE * size, whiten)
    found = (features - mean) @ components.T  # (N, MORE x size)
    scatter = scatter_within(found, products)
    level = scatter.diagonal().mean()
    if level <= 0:
        return mean, components[:size]
    variances, directions = torch.linalg.eigh(scatter + SHRINKAGE * level * torch.eye(len(scatter)).double())
    whitener = directions / variances.sqrt() @ directions.T
    scaled = found @ whitener
    _, kept = torch.linalg.eigh(scaled.T @ scaled)  # ascending
    return mean, kept[:, -size:].flip(1).T @ whitener @ components


def scatter_within(features: Tensor, products: Tensor) -> Tensor:
    """Covariance of float64 (N, C) around the means of their products, (C, C); 0 where no product has two items."""
    _, place, counts = products.unique(return_inverse=True, return_counts=True)
    sums = features.new_zeros(len(counts), features.shape[1]).index_add(0, place, features)
    apart = features - (sums / counts.unsqueeze(1))[place]
    scatter: Tensor = apart.T @ apart / max(len(features) - len(counts), 1)
    return scatter


def components_of(features: Tensor, size: int, whiten: bool) -> tuple[Tensor, Tensor]:
    """(mean (W,), weight (size, W)) of principal components of float64 (N, W); rows of 0 where there are fewer.

    Whitened ones are of correlations, with a floor at their mean variance: what varies less is noise.
    """
    width = features.shape[1]
    mean, weight = torch.zeros(width, dtype=torch.float64), torch.zeros(size, width, dtype=torch.float64)
    if len(features) < 2:
        return mean, weight
    mean, deviation = features.mean(dim=0), features.std(dim=0)
    varied = deviation > 0  # on many columns that never vary, LAPACK may not converge
    if not varied.any():
        return mean, weight
    deviation = deviation[varied].clamp(min=1e-6) if whiten else torch.ones_like(deviation[varied])
    scaled = (features - mean)[:, varied] / deviation
    variances, directions = torch.linalg.eigh(scaled.T @ scaled / (len(features) - 1))  # ascending
    if whiten:
        directions = directions / variances.clamp(min=float(variances.mean())).sqrt()
    kept = min(size, len(variances), len(features) - 1)
    weight[:kept, varied] = (directions[:, -kept:] / deviation.unsqueeze(1)).T.flip(0)
    return mean, weight
