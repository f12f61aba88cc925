"""The judges' result file: its rows, written and read, and the manifest beside them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from tongkuan.base.errors import UserError, clip
from tongkuan.records.items import text_field
from tongkuan.records.rows import read_plain_rows

# The judges take at most this many numbers an embedding.
MAX_EMBEDDING = 1024


@dataclass(frozen=True, slots=True)
class Prediction:
    """One line of result.jsonl: embeddings float64 (D,), the pair is "same" when its score > threshold."""

    left: str
    left_embedding: NDArray[np.float64]
    right: str
    right_embedding: NDArray[np.float64]
    threshold: float


def format_embedding(embedding: NDArray[np.float32]) -> bytes:
    """A JSON list with the fewest digits that restore each float32. Raises ValueError when one is not finite."""
    if not np.isfinite(embedding).all():
        raise ValueError("an embedding holds numbers that are not finite")
    return orjson.dumps(np.ascontiguousarray(embedding), option=orjson.OPT_SERIALIZE_NUMPY)


def prediction_row(left: str, left_text: bytes, right: str, right_text: bytes, threshold: float) -> bytes:
    """One line of result.jsonl from two formatted embeddings, as orjson would write it.

    Joined by hand: an embedding needs no escaping, and looking for some in 20 KB a row would be most of the time.
    """
    source, target = orjson.dumps(left), orjson.dumps(right)
    return b'{"src_item_id":%b,"src_item_emb":"%b","tgt_item_id":%b,"tgt_item_emb":"%b","threshold":%b}\n' % (
        source, left_text, target, right_text, orjson.dumps(threshold),
    )  # fmt: skip


def read_predictions(path: Path) -> Iterator[tuple[str, Prediction]]:
    """Yield (file:line, Prediction) of a result file, each line checked against the judges' contract."""
    for number, row in read_plain_rows(path, "run ./entrypoint.sh predict"):
        where = f"{path}:{number}"
        threshold = row.get("threshold")
        if isinstance(threshold, bool) or not isinstance(threshold, int | float):
            raise UserError(f"{where}: threshold must be a number, found {clip(threshold)}; predict again")
        left, right = (text_field(row, key, where) for key in ("src_item_id", "tgt_item_id"))
        yield (
            where,
            Prediction(
                left,
                parse_embedding(row.get("src_item_emb"), f"{where}: src_item_emb"),
                right,
                parse_embedding(row.get("tgt_item_emb"), f"{where}: tgt_item_emb"),
                float(threshold),
            ),
        )


def parse_embedding(text: object, where: str) -> NDArray[np.float64]:
    """float64 (D,) of a string that holds a JSON list of 1 to 1,024 finite numbers."""
    if not isinstance(text, str):
        raise UserError(f"{where} must be a string holding a JSON list, found {clip(text)}; predict again")
    try:
        numbers = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{where} is not a JSON list; predict again") from error
    if not isinstance(numbers, list) or not 1 <= len(numbers) <= MAX_EMBEDDING:
        raise UserError(f"{where} must hold 1 to {MAX_EMBEDDING} numbers; predict again")
    if not all(type(number) in (int, float) for number in numbers):
        raise UserError(f"{where} holds something that is not a number; predict again")
    return np.array(numbers, dtype=np.float64)
