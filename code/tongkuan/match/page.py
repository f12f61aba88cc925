"""A page on the groups of a catalogue: the largest, the loosest and the surest, with titles and small pictures.

It has no script and fetches nothing. Titles and ids are a stranger's text: the template escapes them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tongkuan.base.files import publish
from tongkuan.match.files import Folder
from tongkuan.records.items import Item
from tongkuan.report.template import filled, flat
from tongkuan.report.views import DAMAGED, MAX_TITLE, MAX_VALUE, NO_FILE, Pictures, clipped

SHOWN, MEMBERS = 12, 8  # groups of a list, listings of a group
MAX_SIZES = 12  # columns of the table of sizes
LACK = {NO_FILE: "its picture is missing", DAMAGED: "its picture cannot be read"}


@dataclass(frozen=True, slots=True)
class Group:
    """A group of two listings or more, as groups.parquet has it."""

    group_id: str
    size: int
    density: float
    weakest: float
    item_ids: list[str]
    """In the order of the items."""

    @property
    def shown(self) -> list[str]:
        """Those that stand on the page."""
        return self.item_ids[:MEMBERS]


def groups_of(table: pa.Table) -> list[Group]:
    """Groups of two or more, in the order of their first listings."""
    found: dict[str, Group] = {}
    for row in table.filter(pc.greater(table["size"], 1)).to_pylist():
        group_id = row["group_id"]
        if group_id not in found:
            found[group_id] = Group(clipped(group_id, MAX_VALUE), row["size"], row["density"], row["weakest"], [])
        found[group_id].item_ids.append(row["item_id"])
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Section:
    """A list of the page."""

    key: str
    name: str
    about: str
    groups: Sequence[Group]
    """The first SHOWN of an order."""


def sections_of(groups: Sequence[Group]) -> list[Section]:
    """The three lists of the page."""
    largest = sorted(groups, key=lambda group: (-group.size, group.density, group.group_id))
    loosest = sorted(groups, key=lambda group: (group.density, group.weakest, group.group_id))
    surest = sorted(groups, key=lambda group: (-group.weakest, group.group_id))
    about = "The fewest of their pairs match; of equal shares, those whose weakest pair has the lowest score."
    return [
        Section("largest", "Largest groups", "Many listings are seldom one product: look here first.", largest[:SHOWN]),
        Section("loosest", "Loosest groups", about, loosest[:SHOWN]),
        Section("surest", "Surest groups", "Even their weakest pair has a high score.", surest[:SHOWN]),
    ]


def sizes_of(groups: Sequence[Group]) -> list[tuple[str, int]]:
    """(size, how many groups have it), the largest sizes together."""
    counts = sorted(Counter(group.size for group in groups).items())
    shown = [(f"{size:,}", count) for size, count in counts[:MAX_SIZES]]
    if rest := counts[MAX_SIZES:]:
        shown.append((f"{rest[0][0]:,} or more", sum(count for _, count in rest)))
    return shown


def member(item: Item, pictures: Pictures) -> dict[str, str]:
    """What is shown of a listing."""
    image = pictures.encoded(item.image_name)
    lack = "" if image else LACK.get(pictures.state(item.image_name), "it names no picture")
    return {
        "item_id": clipped(item.item_id, MAX_VALUE),
        "title": clipped(item.title, MAX_TITLE),
        "image": image,
        "lack": lack,
    }


def write_page(
    folder: Folder, items: Mapping[str, Item], pictures: Pictures, manifest: Mapping[str, Any], notes: Sequence[str]
) -> None:
    """Publish the page of a folder's groups; `notes` are warnings of the run."""
    groups = groups_of(pq.read_table(folder.groups))
    sections = sections_of(groups)
    members = {item_id: None for section in sections for group in section.groups for item_id in group.shown}
    page = filled(
        "groups.html.j2",
        {
            "counts": manifest["counts"],
            "recall": manifest["recall"]["of_matches"],
            "grouped": sum(group.size for group in groups),
            "sizes": sizes_of(groups),
            "sections": sections,
            "members": {item_id: member(items[item_id], pictures) for item_id in members},
            "notes": notes,
            "facts": flat({name: value for name, value in manifest.items() if name != "embeddings"}),
        },
    )
    with publish(folder.page) as file:
        file.write(page)
