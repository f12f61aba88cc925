"""Blending: each item's q moves towards its nearest neighbours' among the items at hand (`--blend`).

A listing that is hard to tell by itself is told by those next to it: what the best entries of the Shopee competition
(Kaggle, 2021) call neighbourhood blending. Scores then depend on the other items of the split.
"""

from collections.abc import Mapping

import numpy as np
from tqdm import tqdm

from tongkuan.encode.encode import Embeddings, one_thread_each

NEIGHBOURS = 3  # at most
TINY = np.finfo(np.float32).tiny
LEAST = 0.5  # cosine of q of a neighbour
BLOCK = 1024  # rows at once against all


def blend(embeddings: Mapping[str, Embeddings]) -> dict[str, Embeddings]:
    """Embeddings [p ; q] float32 (2D,) by item, p as before, q of the same norm.

    A q's new direction is the sum of its own and its neighbours' unit vectors, each times its cosine.
    """
    rows = np.stack([*embeddings.values()])
    q = rows[:, rows.shape[1] // 2 :].copy()
    norms = np.linalg.norm(q, axis=1, keepdims=True)
    units = q / np.maximum(norms, TINY)
    kept = min(NEIGHBOURS, len(q) - 1)
    progress = tqdm(total=len(q), desc="blend", unit="item", disable=None)
    with one_thread_each(), progress:
        for start in range(0, len(q) if kept else 0, BLOCK):
            block = slice(start, min(start + BLOCK, len(q)))
            own = np.arange(block.start, block.stop)
            cosines = units[block] @ units.T
            cosines[own - start, own] = -1  # no neighbour of itself
            nearest = np.argpartition(-cosines, kept - 1, axis=1)[:, :kept]  # (rows, kept)
            weights = np.take_along_axis(cosines, nearest, axis=1)
            weights[weights < LEAST] = 0
            blended = units[block] + (weights[:, :, None] * units[nearest]).sum(axis=1)
            blended *= norms[block] / np.maximum(np.linalg.norm(blended, axis=1, keepdims=True), TINY)
            rows[block, q.shape[1] :] = blended
            progress.update(len(own))
    return dict(zip(embeddings, rows, strict=True))
