"""What every store can do, and how it ranks what its engine finds, so that all of them give the same answer.

A store holds unit rows, whose inner product is the cosine of [p ; q]. The model's scores are computed elsewhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tongkuan.base.errors import UserError
from tongkuan.encode.encode import Embeddings
from tongkuan.match.candidates import unit_rows
from tongkuan.match.scores import ROUNDING, exact_cosines

MORE = 8  # asked of an engine beyond k, so that what is as near as the last of k is mostly among them


@dataclass(frozen=True, slots=True)
class Found:
    """Of each of Q queries the nearest listings, by falling cosine, equal cosines in the order of ids."""

    ids: list[list[str]]
    """Q lists of at most k."""
    cosines: list[NDArray[np.float32]]
    """As long as the lists of ids."""


class Store(Protocol):
    """Embeddings [p ; q] of listings, by id. Made by `open_store`, `FaissStore` or `MilvusStore.create`.

    A row of zeros has cosine 0 with every other. What was written is found by the next call.
    """

    def upsert(self, ids: Sequence[str], categories: Sequence[str], embeddings: Embeddings) -> None:
        """Add N listings of float32 (N, W), or put them in the place of those of the same ids; the last of two counts.

        UserError when a number is not finite or an id is too long for the store.
        """

    def delete(self, ids: Sequence[str]) -> None:
        """Take listings out; ids that are not there are passed over."""

    def search(self, embeddings: Embeddings, k: int, category: str | None = None) -> Found:
        """The k nearest of each row of float32 (Q, W): of all listings, or of those of a category. k is 1 or more."""

    def count(self) -> int:
        """How many listings there are."""


@dataclass(frozen=True, slots=True)
class Hits:
    """What an engine finds for one query, by falling inner product."""

    products: NDArray[np.float32]
    """(m,)."""
    ids: list[str]
    units: Embeddings
    """(m, W), the rows as they are stored."""


def rows_to_store(
    ids: Sequence[str], categories: Sequence[str], embeddings: Embeddings, width: int
) -> tuple[list[str], list[str], Embeddings]:
    """Ids, categories and unit rows, each id once, as it came last."""
    last = {item_id: place for place, item_id in enumerate(ids)}
    places = np.fromiter(last.values(), np.int64, len(last))
    units = checked_units(embeddings, width)
    kept = [categories[place] for place in places]
    return list(last), kept, units if len(last) == len(units) else units[places]


def checked_units(embeddings: Embeddings, width: int) -> Embeddings:
    """Unit rows, float32 (N, width). UserError when a number is not finite or the width is another."""
    if embeddings.shape[1] != width:
        raise UserError(f"embeddings of {embeddings.shape[1]} numbers, the store holds {width}: use the model it is of")
    if not np.isfinite(embeddings).all():
        raise UserError("an embedding holds numbers that are not finite; the model is damaged: train again")
    return unit_rows(embeddings)


def answer(look_up: Callable[[Embeddings, int], list[Hits]], units: Embeddings, k: int, most: int) -> Found:
    """The k nearest of each unit row (Q, W), of what `look_up` finds; it can be asked for `most` at once.

    An engine's float32 sums hang on its blocks and kernels, and of equal ones it returns any. So it is asked for more,
    until the last is clearly farther than the k-th, and these are ranked by exact cosines. Where `most` are as near as
    the k-th, which of them come is the engine's choice.
    """
    found = Found([[] for _ in units], [np.empty(0, np.float32) for _ in units])
    open_queries, asked = list(range(len(units))), min(k + MORE, most)
    while open_queries:
        again = []
        for query, hits in zip(open_queries, look_up(units[open_queries], asked), strict=True):
            is_all = len(hits.ids) < asked or asked == most
            if is_all or hits.products[-1] < hits.products[k - 1] - ROUNDING:
                found.ids[query], found.cosines[query] = ranked(units[query], hits, k)
            else:
                again.append(query)
        open_queries, asked = again, min(4 * asked, most)
    return found


def ranked(unit: Embeddings, hits: Hits, k: int) -> tuple[list[str], NDArray[np.float32]]:
    """The first k of hits for a unit row (W,)."""
    count = len(hits.ids)
    both = np.concatenate([unit[None], hits.units])
    cosines = exact_cosines(both, np.zeros(count, np.int32), np.arange(1, count + 1, dtype=np.int32)).astype(np.float32)
    order = sorted(range(count), key=lambda place: (-cosines[place], hits.ids[place]))[:k]
    return [hits.ids[place] for place in order], cosines[order]
