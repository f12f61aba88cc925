"""A made catalogue of embeddings with planted products, and what its join costs and finds.

`PYTHONPATH=code:. .venv/bin/python -P code/benchmarks/catalogue.py --listings 100000`

Listings lie about a centre of their category, of about 500 listings, in directions of falling variance. A tenth stands
in groups of 2 to 6 that sell one product, each about its own point. By default p is as long as q, as trained models
have it, which is the harder case; `--p 0.25` makes the easier one.

`--add 1000` matches all but that many on the disk, then adds those and asks about some, as `match add` and `match
query` do once the listings are encoded.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tongkuan.encode.encode import Embeddings
from tongkuan.match import files
from tongkuan.match.candidates import build_index, exact_neighbours, index_neighbours, local_means
from tongkuan.match.change import apply, columns_of
from tongkuan.match.files import Folder
from tongkuan.match.join import Join, Listings, Verdict, write_groups
from tongkuan.match.options import Engine, Options
from tongkuan.match.query import Searcher
from tongkuan.match.scores import Catalogue, Pairs, all_pairs, candidate_pairs
from tongkuan.match.search import wants_index
from tongkuan.match.state import open_state
from tongkuan.match.threshold import from_sample
from tongkuan.match.transaction import drop_changes, file_sums, write_manifest

CATEGORY = 500  # listings
GROUPED = 0.1  # of the listings
NOISE = (0.2, 0.65)  # of a listing about its product, from and to
SAMPLE = 2000  # rows that are held against all
ASKED = 50  # listings that are asked about


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


def made_apart(*given: int | float) -> tuple[Embeddings, NDArray[np.int64]]:
    """As `make`, in a process of its own: the memory that it takes is not what is measured."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.npy" for name in ("embeddings", "products")]
        process = multiprocessing.get_context("spawn").Process(target=save, args=(paths, given))
        process.start()
        process.join()
        embeddings, products = map(np.load, paths)
    return embeddings, products


def save(paths: list[Path], given: tuple[Any, ...]) -> None:
    """What `make` makes, as files."""
    for path, array in zip(paths, make(*given), strict=True):
        np.save(path, array)


def keys(pairs: Pairs) -> NDArray[np.int64]:
    """A number for each pair."""
    return np.minimum(pairs.left, pairs.right).astype(np.int64) << 32 | np.maximum(pairs.left, pairs.right)


def cpu() -> float:
    """Seconds of all cores that this process has used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(num_listings: int, half: int, p_length: float, k: int, recall: float, engine: Engine, floor: float) -> None:
    """Print a line a phase."""
    embeddings, products = made_apart(num_listings, half, p_length, 0)
    rows = np.arange(num_listings, dtype=np.int32)
    started, wall = cpu(), time.perf_counter()

    def note(what: str) -> None:
        spent = f"cpu {cpu() - started:7.1f} s  wall {time.perf_counter() - wall:7.1f} s"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{what:<66} {spent}  {peak:.2f} GiB", flush=True)

    if wants_index(engine, np.zeros_like(rows), 2 * half):
        index = build_index(embeddings, k, recall)
        note(f"index, {index.probes} of {index.lists.nlist} lists, recall of candidates {index.recall:.4f}")
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


def embedding_table(item_ids: Sequence[str], embeddings: Embeddings) -> pa.Table:
    """Embeddings (N, 2D) as a file of them has them, without a category."""
    columns = {
        "item_id": pa.array(item_ids, pa.string()),
        "category": pa.array([""] * len(item_ids), pa.string()),
        "norm": np.linalg.norm(embeddings, axis=1),
        "e": files.matrix(embeddings),
    }
    return pa.table(columns)


def match_embeddings(
    path: Path, item_ids: Sequence[str], embeddings: Embeddings, verdict: Verdict, options: Options
) -> Folder:
    """The folder that `match run` leaves of listings whose embeddings (N, 2D) are these."""
    folder, made_of = Folder(path), files.sum_of(list(item_ids))
    drop_changes(folder)
    files.write_table(folder.part("embeddings", 0), columns_of(embedding_table(item_ids, embeddings)), made_of)
    join = Join.of(Listings.of(list(item_ids), embeddings, [""] * len(item_ids)), [made_of], folder, options)
    found = join.pairs(verdict)
    manifest = {
        "sha256": {"model": ""},
        "options": asdict(options),
        "threshold": {"value": verdict.threshold},
        "score_above": verdict.score_floor,
        "precision": "fp32",
        "encode_batch": 32,
        "recall": {"of_matches": join.measured_recall(found, verdict)},
        "counts": write_groups(join, found, verdict, options.groups).counts,
        "files": file_sums(folder),
    }
    write_manifest(folder, manifest)
    return folder


def measure_adding(count: int, num_added: int, half: int, p_length: float, floor: float, threshold: float) -> None:
    """Print what adding to a catalogue on the disk takes, and asking."""
    embeddings, _ = made_apart(count + num_added, half, p_length, 0)
    item_ids = [f"{row:09}" for row in range(len(embeddings))]
    with tempfile.TemporaryDirectory() as top:
        verdict, old = Verdict(floor, threshold), slice(0, count)
        folder = match_embeddings(Path(top), item_ids[old], embeddings[old], verdict, Options())
        added = embedding_table(item_ids[count:], embeddings[count:])
        before, started = cpu(), time.perf_counter()
        state = open_state(folder)
        print(f"read {time.perf_counter() - started:.2f} s")
        changed = apply(state, np.zeros(count, bool), added, "added")
        spent = f"cpu {cpu() - before:.2f} s, wall {time.perf_counter() - started:.2f} s"
        print(f"{num_added:,} added to {count:,}: {changed.matches:,} matches, {spent}")
        started = time.perf_counter()
        searcher = Searcher.of(open_state(folder))
        print(f"loaded in {time.perf_counter() - started:.2f} s")
        started = time.perf_counter()
        for item_id in item_ids[:: len(item_ids) // ASKED]:
            searcher.stored(item_id, 10)
        print(f"one query {(time.perf_counter() - started) / len(item_ids[:: len(item_ids) // ASKED]):.4f} s")


def main() -> None:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listings", type=int, default=100_000)
    parser.add_argument("--half", type=int, default=128, help="numbers of p, and of q")
    parser.add_argument("--p", type=float, default=1.0, help="length of p; q has 1")
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--recall", type=float, default=0.99)
    parser.add_argument("--engine", choices=("auto", "exact", "faiss"), default="auto", help="as of match run")
    parser.add_argument("--score-above", type=float, default=-2.0, help="the model's threshold")
    parser.add_argument("--add", type=int, default=0, help="measure adding so many to --listings instead")
    parser.add_argument("--threshold", type=float, default=0.1, help="of scaled cosines, with --add")
    given = parser.parse_args()
    if given.add:
        measure_adding(given.listings, given.add, given.half, given.p, given.score_above, given.threshold)
        return
    measure(given.listings, given.half, given.p, given.candidates, given.recall, given.engine, given.score_above)


if __name__ == "__main__":
    main()
