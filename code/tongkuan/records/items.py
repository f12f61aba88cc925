"""Items, pairs and predictions: the only file that knows JSON keys.

A line of a user's file becomes an `Item` or a `Pair` here, checked once; an error names file and line.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

from tongkuan.base.errors import UserError, clip, nearest
from tongkuan.records.attribute_syntax import canonical, digits_of, pairs_of_value
from tongkuan.records.rows import given, lines_of, read_rows
from tongkuan.records.streams import open_stream, reading

# From here on two whole numbers can be one float.
MAX_EXACT = 2**53
SPLITS = ("train", "valid", "test")
HANDED_OUT = "handed_out"  # the folder in a data folder that split reads
LABELS = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}


@dataclass(frozen=True, slots=True)
class Item:
    """A listing. Every text may be empty; `attributes` are the raw item-level and SKU-level strings.

    Attributes that a file has as JSON values are strings here too: `key#:#value#;#key#:#value#;#`.
    """

    item_id: str
    title: str = ""
    item_attributes: str = ""
    sku_attributes: str = ""
    image_name: str = ""
    industry: str = ""
    category: str = ""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two item ids and, when known, whether they are the same product (1) or not (0)."""

    left: str
    right: str
    label: int | None = None


def item_file(data_dir: Path, split: str) -> Path:
    """Where a split's items lie."""
    return data_dir / f"item_{split}_info.jsonl"


def pair_file(data_dir: Path, split: str) -> Path:
    """Where a split's pairs lie."""
    return data_dir / f"item_{split}_pair.jsonl"


def read_items(path: Path, advice: str = "run ./entrypoint.sh resize, or ./entrypoint.sh demo") -> dict[str, Item]:
    """Items of an info file by id, in file order. A repeated id must repeat the same item."""
    return {item.item_id: item for item, _ in read_item_rows(path, advice)}


def read_item_rows(path: Path, advice: str) -> Iterator[tuple[Item, dict[str, Any]]]:
    """As read_items, each line's item with its raw row; an item that is repeated comes again."""
    seen: dict[str, Item] = {}
    for number, row in read_rows(path, advice):
        item = parse_item(row, f"{path}:{number}")
        if seen.setdefault(item.item_id, item) != item:
            raise UserError(
                f"{path}:{number}: item {clip(item.item_id)} stands here twice with different content; keep one line"
            )
        yield seen[item.item_id], row


def parse_item(row: Mapping[str, Any], where: str) -> Item:
    """An Item from one JSON object; any key but `item_id` may be missing, null or empty."""
    item_id = id_field(row, "item_id", where)
    if not item_id:
        raise UserError(f"{where}: no item_id, but {clip(sorted(row))}; every item needs one")
    return Item(
        item_id=item_id,
        title=text_field(row, "title", where),
        item_attributes=attribute_field(row, "item_pvs", where),
        sku_attributes=attribute_field(row, "sku_pvs", where),
        image_name=inside(text_field(row, "item_image_name", where)),
        industry=text_field(row, "industry_name", where),
        category=text_field(row, "cate_name_path", where) or text_field(row, "cate_name", where),
    )


def inside(name: str) -> str:
    """A picture's path without what leads out of its folder: `../a//b.jpg` and `/a/b.jpg` are `a/b.jpg`."""
    return "/".join(step for step in name.split("/") if step not in ("", ".", ".."))


def text_field(row: Mapping[str, Any], key: str, where: str) -> str:
    """A text value; numbers are taken as their digits, null and NaN as empty."""
    value = row.get(key)
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return digits_of(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{where}: {key} must be a text, found {clip(value)}; put a text in quotation marks there")


def id_field(row: Mapping[str, Any], key: str, where: str) -> str:
    """An id as text. A whole float (1001.0) is taken for the number; one too large to be exact is an error."""
    value = row.get(key)
    if isinstance(value, float) and value == value and abs(value) >= MAX_EXACT:
        raise UserError(
            f"{where}: {key} {clip(value)} is a float beyond 2^53, which stands for several whole numbers; write the "
            "id as text, in quotation marks"
        )
    return text_field(row, key, where)


def attribute_field(row: Mapping[str, Any], key: str, where: str) -> str:
    """Attributes as text: a text as it stands, a dict or list as `key#:#value#;#…`."""
    value = row.get(key)
    if not isinstance(value, Mapping | list):
        return text_field(row, key, where)
    try:
        return canonical(pairs_of_value(value))
    except ValueError as error:
        raise UserError(f"{where}: {key} is {error}; write it as text: key#:#value#;#key#:#value") from error


def read_pairs(
    path: Path,
    items: Mapping[str, Item] | None = None,
    labels: Literal["required", "optional"] = "required",
    items_path: Path | None = None,
    advice: str = "run ./entrypoint.sh split, or ./entrypoint.sh demo",
) -> list[Pair]:
    """Pairs in file order. With `items`, an id that is not among them is an error; an empty file always is."""
    pairs = []
    for number, row in read_rows(path, advice):
        where = f"{path}:{number}"
        pair = Pair(id_field(row, "src_item_id", where), id_field(row, "tgt_item_id", where), parse_label(row, where))
        if not pair.left or not pair.right:
            raise UserError(f"{where}: a pair needs src_item_id and tgt_item_id; mend or delete the line")
        if pair.label is None and labels == "required":
            raise UserError(f"{where}: no item_label; use pairs with labels 0 or 1 here")
        for item_id in (pair.left, pair.right):
            if items is not None and item_id not in items:
                place = items_path.name if items_path else "the info file"
                hint = nearest(item_id, items)
                raise UserError(f"{where}: unknown item {clip(item_id)}{hint}; add it to {place} or drop the pair")
        pairs.append(pair)
    if not pairs:
        raise UserError(f"{path}: no pairs; it needs one line a pair with src_item_id and tgt_item_id")
    return pairs


def components(pairs: Sequence[Pair]) -> list[list[int]]:
    """Indices of pairs, grouped so that no item is in two groups (union-find); groups by their first pair."""
    parents: dict[str, str] = {}

    def find(item_id: str) -> str:
        parents.setdefault(item_id, item_id)
        while parents[item_id] != item_id:
            parents[item_id] = parents[parents[item_id]]  # halving the path keeps long chains cheap
            item_id = parents[item_id]
        return item_id

    for pair in pairs:
        left, right = find(pair.left), find(pair.right)
        parents[max(left, right)] = min(left, right)
    groups: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(find(pair.left), []).append(index)
    return list(groups.values())


def parse_label(row: Mapping[str, Any], where: str) -> int | None:
    """0, 1, or None when the line has no label: null, NaN or an empty text. 1.0, "1.0" and true are 1."""
    value = row.get("item_label")
    if value is None or value == "" or value != value:
        return None
    label = LABELS.get(str(value).lower()) if isinstance(value, str | int | float) else None
    if label is None and value == 0:
        label = 0  # -0.0
    if label is None:
        raise UserError(
            f"{where}: item_label must be 0 or 1, found {clip(value)}; write 1 for the same product, 0 for different "
            "ones, or delete the line"
        )
    return label


def info_row(row: Mapping[str, Any], image_name: str) -> bytes:
    """An organiser's item line with its picture's name replaced. Raises UserError when it is nested too deeply."""
    changed = {**row, "item_image_name": image_name}
    try:
        return orjson.dumps(changed) + b"\n"
    except TypeError:  # numbers of more than 64 bits, or deeper than orjson writes
        pass
    try:
        text = json.dumps(changed, ensure_ascii=False, separators=(",", ":"))
    except RecursionError as error:
        raise UserError(f"item {clip(row.get('item_id'))}: its line is nested too deeply; flatten it") from error
    return text.encode() + b"\n"


def pair_row(pair: Pair) -> bytes:
    """A pair line in the organiser's format."""
    label = {} if pair.label is None else {"item_label": str(pair.label)}
    return orjson.dumps({"src_item_id": pair.left, "tgt_item_id": pair.right, **label}) + b"\n"


def read_ids(path: Path, advice: str = "name a file of one item_id a line") -> list[str]:
    """Ids of a text file, one a line, or of a file of items. UserError when it is neither."""
    with open_stream(given(path), advice) as stream, reading(path):
        lines = list(lines_of(stream.file, path))
    if lines and lines[0][1].lstrip()[:1] in (b"{", b"["):
        return list(read_items(path, advice))
    ids = []
    for number, text in lines:
        try:
            ids.append(text.decode().strip())
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: not UTF-8; write one item_id a line in UTF-8") from error
    return ids
