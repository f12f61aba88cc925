"""Projections: principal components, then the directions in which products stand apart."""

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn.functional import normalize

from tongkuan.learn.discriminant import (
    MORE,
    SHRINKAGE,
    components_of,
    cross_fitted,
    directions_of,
    folds_of,
    scatter_within,
)
from tongkuan.records.items import Pair


def listings(products: int, each: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features float64 (products x each, 12) and product numbers: 0 to 2 tell the product, 3 to 8 only the listing."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.arange(products).repeat_interleave(each)
    features = 0.1 * torch.randn(len(number), 12, generator=generator, dtype=torch.float64)
    features[:, :3] += torch.randn(products, 3, generator=generator, dtype=torch.float64)[number]
    features[:, 3:9] += 2 * torch.randn(len(number), 6, generator=generator, dtype=torch.float64)
    return features, number


def gap(mean: Tensor, weight: Tensor, features: Tensor, number: Tensor) -> float:
    """Mean likeness of listings of one product less that of others."""
    unit = normalize((features - mean) @ weight.T, dim=1)
    likeness, same = unit @ unit.T, number.unsqueeze(1) == number
    off = ~torch.eye(len(number)).bool()
    return float(likeness[same & off].mean() - likeness[~same].mean())


@pytest.mark.parametrize("whiten", [False, True])
def test_what_differs_within_products_counts_little_on_new_ones(whiten: bool) -> None:
    train, new = listings(60, 3, seed=0), listings(40, 3, seed=1)
    assert gap(*directions_of(*train, 4, whiten), *new) > 2 * gap(*components_of(train[0], 4, whiten), *new)


@pytest.mark.parametrize("whiten", [False, True])
def test_directions_are_fishers(whiten: bool) -> None:
    """They solve T v = m S v, where S is the scatter within products and T that of all; v'Sv is 1."""
    features, number = listings(30, 3, seed=0)
    mean, weight = directions_of(features, number, 4, whiten)
    centre, components = components_of(features, MORE * 4, whiten)
    found = (features - centre) @ components.T
    within = scatter_within(found, number)
    within += SHRINKAGE * within.trace() / len(within) * torch.eye(len(within)).double()
    _, vectors = scipy.linalg.eigh((found.T @ found).numpy(), within.numpy())
    expected = found.numpy() @ vectors[:, ::-1][:, :4]
    assert np.abs(((features - mean) @ weight.T).numpy()) == pytest.approx(np.abs(expected), abs=1e-8)


def test_scatter_within_is_of_listings_around_their_product() -> None:
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [7.0, 5.0]]).double()
    assert torch.equal(
        scatter_within(features, torch.tensor([4, 4, 9])), torch.tensor([[2.0, 0.0], [0.0, 0.0]]).double()
    )


def test_where_no_product_has_two_listings_directions_are_components() -> None:
    features, _ = listings(20, 1, seed=0)
    mean, weight = directions_of(features, torch.arange(20), 3, whiten=True)
    expected_mean, expected = components_of(features, 3, whiten=True)
    assert torch.equal(mean, expected_mean) and weight == pytest.approx(expected, abs=1e-12)


def test_directions_that_few_items_do_not_give_are_zeros() -> None:
    features, number = listings(2, 2, seed=0)
    _, weight = directions_of(features, number, 6, whiten=False)
    assert weight.isfinite().all()
    assert int((weight.norm(dim=1) > 1e-9).sum()) == 3, "four items span three directions"
    for none in (torch.zeros(0, 12), torch.ones(1, 12)):
        assert not directions_of(none.double(), torch.arange(len(none)), 2, whiten=True)[1].any()


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize(("items", "width"), [(40, 6), (5, 12)])
def test_components_are_the_principal_ones(items: int, width: int, whiten: bool) -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(items, width)) * np.linspace(0.2, 3, width) + 5
    features[:, 2] = 1.0  # never varies
    mean, weight = components_of(torch.from_numpy(features), 4, whiten)
    kept = min(4, items - 1)
    scaled = features - features.mean(axis=0)
    if whiten:
        scaled /= np.maximum(features.std(axis=0, ddof=1), 1e-6)
    pca = PCA(kept).fit(scaled)
    expected = pca.transform(scaled)
    if whiten:
        floor = np.delete(scaled, 2, axis=1).var(axis=0, ddof=1).mean()
        expected /= np.sqrt(np.maximum(pca.explained_variance_, floor))
    found = ((torch.from_numpy(features) - mean) @ weight.T)[:, :kept].numpy()
    assert np.abs(found) == pytest.approx(np.abs(expected), abs=1e-8)
    assert not weight[kept:].any() and not weight[:, 2].any()


def test_components_of_too_few_items_are_zeros() -> None:
    for features in (torch.zeros(0, 3), torch.ones(1, 3), torch.ones(7, 3)):
        _, weight = components_of(features.double(), 2, whiten=True)
        assert not weight.any()


def test_hundreds_of_columns_that_never_vary_are_no_hindrance() -> None:
    """Of such colour counts LAPACK's solver, asked for all columns, fails a few of a hundred."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        features = torch.zeros(18, 384, dtype=torch.float64)
        features[:, ::17] = torch.rand(18, 23, generator=generator, dtype=torch.float64)
        assert components_of(features, 4, whiten=False)[1].isfinite().all()


def test_a_product_is_in_one_fold_and_its_likeness_is_of_other_products_components() -> None:
    names = [f"{product}-{listing}" for product in range(8) for listing in range(3)]
    row_of = {name: row for row, name in enumerate(names)}
    same = [Pair(f"{p}-{a}", f"{p}-{a + 1}", 1) for p in range(8) for a in range(2)]
    pairs = [*same, *(Pair(f"{p}-0", f"{(p + 1) % 8}-1", 0) for p in range(8))]
    products = torch.arange(24) // 3
    folds = folds_of(products)
    assert (folds.view(8, 3) == folds.view(8, 3)[:, :1]).all() and len(folds.unique()) == 4
    assert torch.equal(folds, folds_of(products))
    left, right = (torch.tensor([row_of[getattr(pair, side)] for pair in pairs]) for side in ("left", "right"))
    raw = torch.randn(24, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = cross_fitted(raw, products, 3, True, folds, left, right)
    assert (before.abs() <= 1 + 1e-9).all() and torch.equal(
        before, cross_fitted(raw, products, 3, True, folds, right, left)
    )
    product = next(p for p in range(1, 8) if folds[3 * p] == folds[0])
    other = raw.clone()
    other[3 * product : 3 * product + 3] *= -2
    after = cross_fitted(other, products, 3, True, folds, left, right)
    assert torch.equal(after[:2], before[:2]), "pairs of product 0 do not see what shares their fold"
    assert not torch.allclose(after[2:], before[2:])
    other[0] = 0  # lacks it
    lacking = cross_fitted(other, products, 3, True, folds, left, right)
    assert all(
        value == 0 for value, pair in zip(lacking.tolist(), pairs, strict=True) if "0-0" in (pair.left, pair.right)
    )
