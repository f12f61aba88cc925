"""The store that needs no server: all embeddings in memory, every one looked at. Up to about a million listings.

Nothing is kept on the disk: it is made from the catalogue's Parquet files, and what is changed here is lost with it.
"""

from collections.abc import Sequence

import faiss
import numpy as np
from numpy.typing import NDArray

from tongkuan.base.machine import available_cores
from tongkuan.encode.encode import Embeddings
from tongkuan.encode.store import prefetch
from tongkuan.match.candidates import threads_of_faiss
from tongkuan.match.stores.store import Found, Hits, answer, checked_units, rows_to_store

QUERIES = 1024  # looked up together: of fewer, the library takes each by itself, which is slower by a factor of five


class FaissStore:
    """A Store of embeddings of `width` numbers, exact; empty at first."""

    def __init__(self, width: int) -> None:
        self.index = faiss.IndexFlatIP(width)
        self.ids: list[str] = []
        self.rows: dict[str, int] = {}
        self.codes: dict[str, int] = {}  # of categories
        self.category_of = np.empty(0, np.int32)  # -1 for a row that was replaced or deleted

    def upsert(self, ids: Sequence[str], categories: Sequence[str], embeddings: Embeddings) -> None:
        """See Store."""
        ids, categories, units = rows_to_store(ids, categories, embeddings, self.index.d)
        self.delete(ids)
        codes = [self.codes.setdefault(category, len(self.codes)) for category in categories]
        self.category_of = np.concatenate([self.category_of, np.array(codes, np.int32)])
        self.rows |= {item_id: row for row, item_id in enumerate(ids, len(self.ids))}
        self.ids += ids
        self.index.add(units)

    def delete(self, ids: Sequence[str]) -> None:
        """See Store. Their memory is free again once the store is opened anew."""
        gone = [self.rows.pop(item_id) for item_id in set(ids) & self.rows.keys()]
        self.category_of[gone] = -1

    def count(self) -> int:
        """See Store."""
        return len(self.rows)

    def search(self, embeddings: Embeddings, k: int, category: str | None = None) -> Found:
        """See Store."""
        units = checked_units(embeddings, self.index.d)
        wanted = self.category_of >= 0 if category is None else self.category_of == self.codes.get(category, -2)
        most = int(wanted.sum())
        if not most:
            return Found([[] for _ in units], [np.empty(0, np.float32) for _ in units])
        # Its own rows as an array, not a copy.
        stored = faiss.rev_swig_ptr(self.index.get_xb(), self.index.ntotal * self.index.d).reshape(-1, self.index.d)

        def look_up(queries: Embeddings, asked: int) -> list[Hits]:
            parts = (queries[start : start + QUERIES] for start in range(0, len(queries), QUERIES))
            found = prefetch(parts, lambda part: self.look_up(part, asked, wanted, stored), available_cores())
            return [hits for part in found for hits in part]

        return answer(look_up, units, k, most)

    @threads_of_faiss(1)  # the library's own wait for each other longer than they work
    def look_up(self, queries: Embeddings, asked: int, wanted: NDArray[np.bool_], stored: Embeddings) -> list[Hits]:
        """What the index finds among the wanted rows (N,)."""
        bits = np.packbits(wanted, bitorder="little")
        parameters = faiss.SearchParameters()
        if not wanted.all():  # with a selector it is slower for many queries
            parameters.sel = faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))
        products, rows = self.index.search(queries, asked, params=parameters)
        is_there = rows >= 0
        return [
            Hits(own[there], [self.ids[row] for row in found[there]], stored[found[there]])
            for own, found, there in zip(products, rows, is_there, strict=True)
        ]
