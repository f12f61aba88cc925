"""What `match run` may be asked for, and how a server of embeddings is asked."""

from dataclasses import dataclass
from typing import Literal

Engine = Literal["auto", "exact", "faiss"]
Grouping = Literal["average", "strict"]
Within = Literal["none", "category"]
STORE_TOKEN = "TONGKUAN_STORE_TOKEN"  # environment: on the command line every user of the machine would see it


@dataclass(frozen=True, slots=True)
class Options:
    """As given on the command line, of one's own name each."""

    within: Within = "none"
    candidates: int = 50
    """Neighbours of a listing that are scored."""
    threshold: float | None = None
    """Of scaled cosines; None: by labels or by a sample."""
    recall: float = 0.99
    """Of pairs that could match, that an index must reach."""
    engine: Engine = "auto"
    groups: Grouping = "average"
    partition_size: int = 100_000
    """Listings a file."""
