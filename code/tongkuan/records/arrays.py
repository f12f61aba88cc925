"""What a model reads of a batch of items, as arrays of one width: torch takes them as well as ONNX Runtime."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tongkuan.records.words import Word

if TYPE_CHECKING:
    from tokenizers import Tokenizer  # the verbs that prepare pictures work without

NO_WORD = Word(0, -1)


def fit_tokenizer(tokenizer: "Tokenizer", max_tokens: int) -> int:
    """Have it cut texts to `max_tokens` and leave them unpadded; the number to pad with."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer.token_to_id("[PAD]") or 0


def padded_tokens(
    rows: Sequence[Sequence[int] | NDArray[np.int32]], padding: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids and their mask, int64 (N, T), T of the longest row and at least 1."""
    width = max(1, *map(len, rows))
    ids = np.full((len(rows), width), padding, dtype=np.int64)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return ids, mask


def padded_words(rows: Sequence[Sequence[Word]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Buckets and owners of each item's words, int64 (N, G); owners are -1 where there is none."""
    width = max(1, *map(len, rows))
    both = np.array([[*row, *[NO_WORD] * (width - len(row))] for row in rows], dtype=np.int64)
    return np.ascontiguousarray(both[..., 0]), np.ascontiguousarray(both[..., 1])


def stacked_pictures(
    pictures: Sequence[NDArray[np.uint8] | None], size: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """uint8 (N, 3, size, size), zeros where there is none, and whether there is one, bool (N,)."""
    images = np.zeros((len(pictures), 3, size, size), dtype=np.uint8)
    has_image = np.zeros(len(pictures), dtype=bool)
    for row, picture in enumerate(pictures):
        if picture is not None:
            images[row], has_image[row] = picture, True
    return images, has_image
