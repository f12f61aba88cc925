"""Where the work on partitions is done: here, one after the other, or by whatever else has these two methods.

A partition goes in, its numbers come out, and who asked publishes them: so a partition's file has the same bytes
whoever made it, and what is lost with a machine is made again.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from tongkuan.encode.encode import Embeddings
from tongkuan.encode.inference import Inference
from tongkuan.encode.store import ItemStore

Job = TypeVar("Job")
Done = TypeVar("Done")


@dataclass(frozen=True, slots=True)
class Part:
    """A partition to be encoded."""

    label: str
    """For progress."""
    item_ids: Sequence[str]
    made_of: str
    """The sum of all that decides its file, see `embed.sums_of`."""


@dataclass(frozen=True, slots=True)
class EncodedPart:
    """What came of it."""

    embeddings: Embeddings
    """(N, 2D), in the order of the ids."""
    unreadable: set[str]
    """Pictures that are missing or unreadable."""


class Machines(Protocol):
    """Who does the work. Results come with the place of their job, in any order."""

    def each(self, work: Callable[[Job], Done], jobs: Sequence[Job]) -> Iterator[tuple[int, Done]]:
        """work(job) of every job."""

    def encode(self, run: Inference, store: ItemStore, parts: Sequence[Part]) -> Iterator[tuple[int, EncodedPart]]:
        """Embeddings of every partition of the store's items."""


class Here:
    """This process, and the other ranks of its group, which do the same."""

    def each(self, work: Callable[[Job], Done], jobs: Sequence[Job]) -> Iterator[tuple[int, Done]]:
        """As Machines."""
        return ((place, work(job)) for place, job in enumerate(jobs))

    def encode(self, run: Inference, store: ItemStore, parts: Sequence[Part]) -> Iterator[tuple[int, EncodedPart]]:
        """As Machines."""
        return ((place, encode_part(run, store, part)) for place, part in enumerate(parts))


HERE = Here()


def encode_part(run: Inference, store: ItemStore, part: Part) -> EncodedPart:
    """Encode a partition on all ranks of this process's group."""
    embeddings = run.encode(part.label, item_ids=part.item_ids, store=store)
    return EncodedPart(np.stack(list(embeddings.values())), set(store.unreadable))
