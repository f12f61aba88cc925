"""A made catalogue of embeddings with planted products, and what its join costs and finds.

`PYTHONPATH=code:. .venv/bin/python -P code/benchmarks/catalogue.py --listings 100000`

Listings lie about a centre of their category, of about 500 listings, in directions of falling variance. A tenth stands
in groups of 2 to 6 that sell one product, each about its own point. By default p is as long as q, as trained models
have it, which is the harder case; `--p 0.25` makes the easier one.
"""

import argparse
import resource
import time

import numpy as np
from numpy.typing import NDArray

from tongkuan.encode.encode import Embeddings
from tongkuan.match.candidates import build_index, exact_neighbours, index_neighbours
from tongkuan.match.scores import Catalogue, Pairs, all_pairs, candidate_pairs, local_means
from tongkuan.match.threshold import from_sample

CATEGORY = 500  # listings
GROUPED = 0.1  # of the listings
NOISE = (0.2, 0.65)  # of a listing about its product, from and to
SAMPLE = 2000  # rows that are held against all


def make(num_listings: int, half: int, p_length: float, seed: int) -> tuple[Embeddings, NDArray[np.int64]]:
    """(embeddings [p ; q] float32 (N, 2 x half), product (N,)); q has length about 1."""
    generator = np.random.default_rng(seed)
    spread = (1 / np.sqrt(np.arange(1, half + 1))).astype(np.float32)
    sizes = []
    while sum(sizes) < GROUPED * num_listings:
        sizes.append(int(generator.integers(2, 7)))
    grouped = np.repeat(np.arange(len(sizes)), sizes)
    products = np.concatenate([grouped, np.arange(len(sizes), len(sizes) + num_listings - len(grouped))])
    num_products = int(products.max()) + 1
    categories = generator.integers(0, max(1, num_listings // CATEGORY), num_products)
    noise = generator.uniform(*NOISE, num_listings).astype(np.float32)[:, None]
    halves = []
    for length in (p_length, 1.0):
        centres = generator.normal(size=(categories.max() + 1, half)).astype(np.float32) * spread
        points = centres[categories] + generator.normal(size=(num_products, half)).astype(np.float32) * spread
        own = points[products] + noise * generator.normal(size=(num_listings, half)).astype(np.float32) * spread
        halves.append(own * np.float32(length) / np.linalg.norm(own, axis=1, keepdims=True))
    order = generator.permutation(num_listings)
    return np.hstack(halves)[order], products[order]


def keys(pairs: Pairs) -> NDArray[np.int64]:
    """A number for each pair."""
    return np.minimum(pairs.left, pairs.right).astype(np.int64) << 32 | np.maximum(pairs.left, pairs.right)


def cpu() -> float:
    """Seconds of all cores that this process has used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(num_listings: int, half: int, p_length: float, k: int, recall: float, engine: str, floor: float) -> None:
    """Print a line a phase."""
    embeddings, products = make(num_listings, half, p_length, 0)
    rows = np.arange(num_listings, dtype=np.int32)
    started, wall = cpu(), time.perf_counter()

    def note(what: str) -> None:
        spent = f"cpu {cpu() - started:7.1f} s  wall {time.perf_counter() - wall:7.1f} s"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{what:<66} {spent}  {peak:.2f} GiB", flush=True)

    if engine == "faiss":
        index = build_index(embeddings, k, recall)
        note(f"index, {index.probes} of {index.lists.nlist} lists, recall of neighbours {index.recall:.4f}")
        neighbours = index_neighbours(embeddings, index, rows, k)
    else:
        neighbours = exact_neighbours(embeddings, rows, k)
    note("neighbours")
    catalogue = Catalogue(embeddings, local_means(neighbours), np.zeros_like(rows))
    sample = np.random.default_rng(0).choice(rows, min(SAMPLE, num_listings), replace=False)
    threshold = from_sample(all_pairs(catalogue, sample, floor, 0.0, is_upper=False).scaled, len(sample)).value
    found = candidate_pairs(catalogue, neighbours, slice(0, num_listings), floor, threshold)
    note(f"{len(found):,} pairs above {threshold:.4f}")
    wanted = all_pairs(catalogue, sample, floor, threshold, is_upper=False)
    is_true = products[wanted.left] == products[wanted.right]
    hits = np.isin(keys(wanted), keys(found))
    shares = f"found {hits.mean():.4f}, planted ones {hits[is_true].mean():.4f}"
    note(f"sample held against all: {len(wanted):,} pairs, {shares}")


def main() -> None:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listings", type=int, default=100_000)
    parser.add_argument("--half", type=int, default=128, help="numbers of p, and of q")
    parser.add_argument("--p", type=float, default=1.0, help="length of p; q has 1")
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--recall", type=float, default=0.99)
    parser.add_argument("--engine", choices=("exact", "faiss"), default="faiss")
    parser.add_argument("--score-above", type=float, default=-2.0, help="the model's threshold")
    given = parser.parse_args()
    measure(given.listings, given.half, given.p, given.candidates, given.recall, given.engine, given.score_above)


if __name__ == "__main__":
    main()
