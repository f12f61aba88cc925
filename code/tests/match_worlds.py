"""Embeddings of a small catalogue with known products."""

import numpy as np
from numpy.typing import NDArray

from tongkuan.encode.encode import Embeddings
from tongkuan.match.candidates import exact_neighbours, local_means
from tongkuan.match.scores import Catalogue


def planted(
    num_listings: int, width: int = 16, group: int = 4, noise: float = 0.3, seed: int = 0
) -> tuple[Embeddings, NDArray[np.int64]]:
    """(embeddings [p ; q] (N, width), product (N,)): groups of listings about a centre, p as long as q, shuffled."""
    generator = np.random.default_rng(seed)
    products = generator.permutation(np.arange(num_listings) // group)
    centres = generator.normal(size=(products.max() + 1, width))
    embeddings = centres[products] + noise * generator.normal(size=(num_listings, width))
    return embeddings.astype(np.float32), products


def catalogue_of(embeddings: Embeddings, categories: NDArray[np.int32] | None = None) -> Catalogue:
    """With the means of an exact search."""
    rows = np.arange(len(embeddings), dtype=np.int32)
    means = local_means(exact_neighbours(embeddings, rows, 10))
    return Catalogue(embeddings, means, np.zeros_like(rows) if categories is None else categories)
