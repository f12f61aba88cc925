"""Which item gets which picture once all are read, and in a few lines why some get none."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_scripts.linking.ledger import Picture
from data_scripts.linking.matching import Match, Matches
from tongkuan.base.errors import clip
from tongkuan.records.items import Item, Pair

MAX_CAUSES = 4  # lines on the screen
LONGEST_NAME = 100  # characters of a name on the screen


@dataclass(frozen=True, slots=True)
class Records:
    """A split's lines as handed out: items by id, their raw rows, pairs with or without labels."""

    items: dict[str, Item]
    rows: list[tuple[str, dict[str, Any]]]
    """(item id, row) of each line."""
    pairs: list[Pair]


@dataclass(slots=True)
class Cause:
    """Why items are without a picture: how many, the first of them, and what to do about it."""

    text: str
    example: str
    advice: str
    count: int = 0
    is_missing: bool = False

    def __str__(self) -> str:
        return f"{self.text}, such as {self.example}; {self.advice}"


@dataclass(slots=True)
class Links:
    """Output name or "" by split and item id, the ledger's rows for names without a file, and what to report."""

    images: dict[str, dict[str, str]] = field(default_factory=dict)
    absent: list[Picture] = field(default_factory=list)
    named: set[Picture] = field(default_factory=set)
    shared: dict[Picture, list[str]] = field(default_factory=dict)  # whom pictures serve beyond items of their name
    num_named: int = 0  # items that name a picture
    causes: dict[str, Cause] = field(default_factory=dict)
    doubts: dict[str, Cause] = field(default_factory=dict)  # pictures that were taken and may be another product's

    def mark(self) -> None:
        """Write into the pictures' ledger rows whom they serve."""
        for picture in self.named:
            picture.is_named = True
        for picture, served in self.shared.items():
            more = f" and {len(served) - 1:,} more" if len(served) > 1 else ""
            picture.add_detail(f"also the picture of {served[0]}{more}")

    def num_bare(self) -> int:
        return sum(not image for by_id in self.images.values() for image in by_id.values())

    def has_pictures(self) -> bool:
        return any(image for by_id in self.images.values() for image in by_id.values())

    def commonest(self) -> list[Cause]:
        """Causes, the most frequent first."""
        return sorted(self.causes.values(), key=lambda cause: -cause.count)

    def lose(self, text: str, split: str, item: Item, detail: str, advice: str) -> None:
        """Count an item that names a picture and gets none."""
        example = f"{clip(item.image_name, LONGEST_NAME)} of {split} item {clip(item.item_id)}{detail}"
        self.causes.setdefault(text, Cause(text, example, advice)).count += 1

    def doubt(self, text: str, split: str, item: Item, picture: Picture, served: str) -> None:
        """Count an item that gets a picture which may be another product's, and note it for the ledger."""
        example = f"{clip(f'{picture.split}/{picture.path}', LONGEST_NAME)} for {split} item {clip(item.item_id)}"
        advice = "if that is another product, add the right file or empty item_image_name"
        self.doubts.setdefault(text, Cause(text, example, advice)).count += 1
        self.shared.setdefault(picture, []).append(f"item {item.item_id} of {split}, {served}")


def link_pictures(records: Mapping[str, Records], matches: Matches) -> Links:
    """Give every item its picture; what is known to be unreadable has no `image`."""
    links = Links()
    absent: dict[tuple[str, str], Picture] = {}
    for split, record in records.items():
        links.images[split] = {}
        for item in record.items.values():
            picture = link_item(links, split, item, matches) if item.image_name else None
            if item.image_name and picture is None:
                name = item.image_name
                if (split, name) not in absent:
                    absent[split, name] = absent_row(split, item, matches.of[split, name])
            links.images[split][item.item_id] = picture.image if picture else ""
    links.absent = list(absent.values())
    return links


def link_item(links: Links, split: str, item: Item, matches: Matches) -> Picture | None:
    """The file that an item's name means, readable or not. What is lost or taken from elsewhere is counted."""
    match = matches.of[split, item.image_name]
    links.num_named += 1
    picture = match.picture
    if picture is None:
        lose_match(links, split, item, match)
        return None
    name = clip(item.image_name, LONGEST_NAME)
    if not picture.image:
        if other := matches.readable_instead(split, item.image_name):
            picture = other
            links.doubt(
                "with a picture of like name, their own unreadable", split, item, picture, f"for {name} is broken"
            )
        else:
            lose_unreadable(links, split, item, picture)
    elif match.is_of_other_split:
        links.doubt("with a picture of another split", split, item, picture, "which has no such file")
    elif match.is_by_stem and matches.claims.is_claimed(picture, item.image_name):
        links.doubt("with a picture that another item names in full", split, item, picture, f"which names {name}")
    links.named.add(picture)
    return picture


def absent_row(split: str, item: Item, match: Match) -> Picture:
    """The ledger's row of a name that no file was taken for."""
    row = Picture(split, item.image_name, None, status="ambiguous" if match.rivals else "missing")
    row.add_detail(f"may be {rivals_text(match, split)}" if match.rivals else match.detail or "no such file")
    row.add_detail(f"named by item {item.item_id}" + (f" as {item.image_name}" if "/" in item.image_name else ""))
    return row


def rivals_text(match: Match, split: str) -> str:
    """The first two of the files between which nothing decides, with the split of those of another."""
    paths = [picture.path if picture.split == split else f"{picture.split}/{picture.path}" for picture in match.rivals]
    more = f" ({len(paths) - 2} more)" if len(paths) > 2 else ""
    return f"{paths[0]} or {paths[1]}{more}"


def lose_match(links: Links, split: str, item: Item, match: Match) -> None:
    """Count an item whose name leads to no file, or to several."""
    if match.rivals:
        rivals = clip(rivals_text(match, split), 2 * LONGEST_NAME)[1:-1]
        advice = "write the whole path from the pictures' folder, suffix included, into item_image_name"
        if match.is_by_tail or any(picture.split != split for picture in match.rivals):
            advice = f"add the file to the pictures of {split}, or mend its item_image_name"
        elif len({picture.path for picture in match.rivals}) == 1:
            advice = f"its path is twice in the archive: unpack that into item_{split}_images and move it away"
        links.lose("ambiguous", split, item, f" (may be {rivals})", advice)
    else:
        advice = f"add it to the pictures of {split}, or mend its item_image_name"
        links.lose("missing: no such file", split, item, "", advice)
        links.causes["missing: no such file"].is_missing = True


def lose_unreadable(links: Links, split: str, item: Item, picture: Picture) -> None:
    """Count an item whose picture cannot be read, by the cause without its figures."""
    cause = re.sub(r" *\([^()]*\d[^()]*\)|; only \d+%", "", picture.cause.split("; ")[0])
    advice = "get the file again"
    if "encrypted" in cause:
        folder = f"item_{picture.split}_images"
        advice = f"unpack the archive with its password into the folder {folder}, and move the archive away"
    links.lose(f"unreadable: {cause}", split, item, "", advice)


def loss_lines(links: Links) -> list[str]:
    """Lines for the screen; none when every name led to a picture of its own split."""
    causes = links.commonest()
    shown = causes if len(causes) <= MAX_CAUSES else causes[: MAX_CAUSES - 1]
    lines = [f"  {cause.count:,} {cause}" for cause in shown]
    if rest := causes[len(shown) :]:
        lines.append(f"  {sum(cause.count for cause in rest):,} for {len(rest)} other causes, each in the ledger")
    lines += [f"  {doubt.count:,} {doubt}" for doubt in links.doubts.values()]
    return lines


def names_found(pictures: list[Picture]) -> str:
    """What the pictures that are there are called."""
    if not pictures:
        return "; there is none at all"
    return f"; of the {len(pictures):,} there the first is {clip(pictures[0].path, LONGEST_NAME)}"
