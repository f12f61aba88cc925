"""The nearest listings of one, a stored or a new one, with what a run would say of each pair.

`./entrypoint.sh match query --item ID --out match`
`./entrypoint.sh match query --json listing.json --data data --model weights/model.safetensors --out match`
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tongkuan.base.errors import UserError, clip, entrypoint, nearest, one_line
from tongkuan.encode.encode import Embeddings, one_thread_each
from tongkuan.match.add import open_like
from tongkuan.match.candidates import NEAREST, unit_rows
from tongkuan.match.files import Folder
from tongkuan.match.join import Listings
from tongkuan.match.scores import exact_cosines, exact_scores, products
from tongkuan.match.state import State, open_state
from tongkuan.match.stores.fill import open_store
from tongkuan.match.stores.store import Store
from tongkuan.match.transaction import read_manifest

SAME = 1e-5  # of an embedding's largest number: what encoding in batches of another size may change
SPARE = 16  # more than is asked for, that products in float32 name and exact ones put in order


@dataclass(frozen=True, slots=True)
class Hit:
    """A listing near the one that was asked about."""

    item_id: str
    group_id: str
    score: float
    cosine: float
    scaled: float
    is_match: bool


@dataclass(frozen=True, slots=True)
class Searcher:
    """A catalogue in memory, ready to be asked."""

    state: State
    listings: Listings
    units: Embeddings
    """Of the distinct listings at length 1, (M, 2D)."""
    codes: dict[str, int]
    """Of categories, where only listings of one are compared."""
    group_ids: list[str]
    order: NDArray[np.int64]
    """Listings by the distinct one that each is."""
    ends: NDArray[np.int64]
    """(M,): where those of each end in `order`."""
    store: Store | None = None
    """Who names the nearest; None: this process, which looks at all."""

    @classmethod
    def of(cls, state: State, store: Store | None = None) -> "Searcher":
        """Prepare all that does not depend on what is asked."""
        categories = state.compared_within(state.categories)
        listings = Listings.of(state.item_ids, state.embeddings, categories)
        codes = {categories[row]: int(code) for row, code in zip(listings.firsts, listings.categories, strict=True)}
        order = np.argsort(listings.numbers, kind="stable")
        group_ids = state.groups["group_id"].to_pylist()
        units = unit_rows(listings.embeddings)
        return cls(state, listings, units, codes, group_ids, order, np.cumsum(listings.copies), store)

    def stored(self, item_id: str, top: int) -> list[Hit]:
        """The nearest of a listing of the catalogue. UserError when it is not there."""
        try:
            listing = self.state.item_ids.index(item_id)
        except ValueError:
            what = f"no listing {clip(item_id)}{nearest(item_id, self.state.item_ids)}"
            raise UserError(f"{self.state.folder.groups}: {what}; name another, or ask with --json FILE") from None
        row = int(self.listings.numbers[listing])
        code = int(self.listings.categories[row])
        return self.hits(self.listings.embeddings[row], code, float(self.state.means[listing]), top, item_id)

    def new(self, embedding: Embeddings, category: str, top: int) -> list[Hit]:
        """The nearest of an embedding (2D,) in the catalogue."""
        code = self.codes.get(self.state.compared_within([category])[0], -1)
        return self.hits(embedding, code, None, top)

    def hits(self, embedding: Embeddings, code: int, mean: float | None, top: int, own: str | None = None) -> list[Hit]:
        """At most `top` by falling cosine, `own` not among them; without a mean the embedding is given its own."""
        rows = self.candidates(embedding, code, max(top, NEAREST) + SPARE)
        if not len(rows):
            return []
        both = np.concatenate([embedding[None], self.listings.embeddings[rows]])
        left, right = np.zeros(len(rows), np.int32), np.arange(1, len(both), dtype=np.int32)
        cosines = exact_cosines(both, left, right)
        order = np.lexsort((rows, -cosines))
        rows, right, cosines = rows[order], right[order], cosines[order]
        means = self.state.means[self.listings.firsts[rows]]
        if mean is None:  # a copy of a stored listing is in the same place as that one
            gaps = np.abs(self.listings.embeddings[rows] - embedding).max(axis=1)
            is_copy = gaps.min() <= SAME * np.abs(embedding).max()
            mean = float(means[gaps.argmin()] if is_copy else cosines[:NEAREST].mean())
        scores, scaled = exact_scores(both, left, right), 2 * cosines - mean - means
        verdict = self.state.verdict
        is_match = (scores > verdict.score_floor) & (scaled > verdict.threshold)
        found: list[Hit] = []
        numbers = zip(scores.tolist(), cosines.tolist(), scaled.tolist(), is_match.tolist(), strict=True)
        for row, about in zip(rows, numbers, strict=True):
            for listing in self.order[self.ends[row - 1] if row else 0 : self.ends[row]].tolist():
                if len(found) < top and (item_id := self.state.item_ids[listing]) != own:
                    found.append(Hit(item_id, self.group_ids[listing], *about))
        return found

    def candidates(self, embedding: Embeddings, code: int, count: int) -> NDArray[np.int64]:
        """The distinct listings of a category with the largest cosines in float32, in no order."""
        if self.store is not None:
            return self.stored_rows(self.store, embedding, code, count)
        with one_thread_each():
            cosines = products(unit_rows(embedding[None]), self.units)[0]
        cosines[self.listings.categories != code] = -np.inf
        rows = np.arange(len(cosines))
        if count < len(rows):
            rows = np.argpartition(-cosines, count)[:count]
        found: NDArray[np.int64] = rows[np.isfinite(cosines[rows])]
        return found

    def stored_rows(self, store: Store, embedding: Embeddings, code: int, count: int) -> NDArray[np.int64]:
        """The distinct listings of those that a store names; it may hold others than the catalogue has by now."""
        names = [name for name, other in self.codes.items() if other == code]
        if not names:
            return np.empty(0, np.int64)
        (ids,) = store.search(embedding[None], count, names[0] or None).ids
        place = {item_id: number for number, item_id in enumerate(self.state.item_ids)}
        return np.unique([self.listings.numbers[place[item_id]] for item_id in ids if item_id in place])


def match_query(
    item_id: str | None,
    json_path: Path | None,
    data_dir: Path,
    model_path: Path,
    top: int,
    out_dir: Path,
    url: str | None = None,
    collection: str = "",
) -> str:
    """The nearest listings as a table; with a URL it is the server there that names them.

    UserError when both a stored and a new listing are given, or one is unfit.
    """
    if item_id is not None and json_path is not None:
        raise UserError("--item and --json: ask about one listing at a time")
    folder = Folder(out_dir)
    embedding = None
    if json_path is not None:
        with open_like(read_manifest(folder), json_path, data_dir, model_path) as run:
            if len(run.items) != 1:
                raise UserError(f"{json_path}: {len(run.items)} items; put one listing there")
            (asked,) = run.items
            embedding, category = run.encode("encode", item_ids=[asked])[asked], run.items[asked].category
    with nullcontext() if url is None else open_store(folder, url, collection) as store:
        searcher = Searcher.of(open_state(folder), store)
        if embedding is not None:
            hits = searcher.new(embedding, category, top)
        else:
            asked = searcher.state.item_ids[0] if item_id is None else item_id
            hits = searcher.stored(asked, top)
    return "\n".join(lines_on(asked, hits, folder))


def lines_on(asked: str, hits: list[Hit], folder: Folder) -> Iterator[str]:
    """The table, and what to type next."""
    yield f"nearest of {one_line(asked)}, by cosine"
    yield f"{'':<7}{'score':>10}{'cosine':>10}{'scaled':>10}  item_id, group_id"
    for hit in hits:
        numbers = f"{hit.score:>10.4f}{hit.cosine:>10.4f}{hit.scaled:>10.4f}"
        yield f"{'match' if hit.is_match else '-':<7}{numbers}  {one_line(hit.item_id)}, {one_line(hit.group_id)}"
    yield f"next: {entrypoint('match', 'check', '--out', folder.path)}"
