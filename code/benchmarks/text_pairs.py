"""Public text-only pairs as a data folder of our own format: the DeepMatcher project's csv files, or EMBer's parquet.

`PYTHONPATH=code:. .venv/bin/python code/benchmarks/text_pairs.py deepmatcher Abt-Buy/ data/abt-buy`
`PYTHONPATH=code:. .venv/bin/python code/benchmarks/text_pairs.py ember datasets/all/ data/ember --test test_om`
Then `./entrypoint.sh train --data DIR model.inputs=text` and `./entrypoint.sh evaluate --data DIR --split test`.
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from tongkuan.base.errors import UserError
from tongkuan.base.files import publish
from tongkuan.records.items import SPLITS, Pair, item_file, pair_file, pair_row, parse_label

TITLES = ("title", "name")  # the columns that a title is read from, the first that the table has
EMBER_FILES = {"train": "train", "valid": "val"}  # the test file is chosen: there are eight
Row = dict[str, str]
Split = tuple[dict[str, Row], list[Pair]]
"""Info rows by item id, and pairs of them."""


def attribute_text(attributes: Mapping[str, str]) -> str:
    """As the competition writes attributes; what is empty is left out, signs of this writing become blanks."""
    plain = {key: " ".join(value.replace("#", " ").split()) for key, value in attributes.items()}
    return "".join(f"{key.replace('#', ' ')}#:#{value}#;#" for key, value in plain.items() if value)


def info_of(item_id: str, title: str, attributes: str, category: str = "") -> Row:
    """An item's row. The picture's name is empty, there is none."""
    row = {"item_id": item_id, "title": title, "item_pvs": attributes, "item_image_name": ""}
    return {**row, "cate_name": category} if category else row


# ---------------------------------------------------------------------------------------------------------------------
# DeepMatcher: tableA.csv, tableB.csv; train.csv, valid.csv, test.csv of ltable_id, rtable_id, label


def csv_rows(path: Path, *columns: str) -> Iterator[dict[str, str]]:
    """Rows of a csv file that has these columns."""
    if not path.is_file():
        raise UserError(f"{path}: missing; the folder needs tableA.csv, tableB.csv, train.csv, valid.csv and test.csv")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if missing := [column for column in columns if column not in (reader.fieldnames or ())]:
            raise UserError(f"{path}: no column {', '.join(missing)}; found {', '.join(reader.fieldnames or ())}")
        for row in reader:
            yield {key: value for key, value in row.items() if isinstance(value, str)}


def read_table(path: Path, side: str) -> dict[str, Row]:
    """Info rows of a table by item id. The two tables count their ids each from 0, so `side` stands before."""
    items = {}
    for row in csv_rows(path, "id"):
        item_id = side + row.pop("id")
        title = next((row.pop(column) for column in TITLES if column in row), "")
        items[item_id] = info_of(item_id, title, attribute_text(row))
    return items


def read_deepmatcher(folder: Path) -> Iterator[tuple[str, Split]]:
    """The published splits, each with the items that it speaks of."""
    items = {**read_table(folder / "tableA.csv", "a"), **read_table(folder / "tableB.csv", "b")}
    for split in SPLITS:
        path = folder / f"{split}.csv"
        pairs = [
            Pair("a" + row["ltable_id"], "b" + row["rtable_id"], parse_label({"item_label": row["label"]}, str(path)))
            for row in csv_rows(path, "ltable_id", "rtable_id", "label")
        ]
        ids = dict.fromkeys(item_id for pair in pairs for item_id in (pair.left, pair.right))
        if unknown := [item_id for item_id in ids if item_id not in items]:
            table = f"table{unknown[0][0].upper()}.csv"
            raise UserError(f"{path}: id {unknown[0][1:]} is not in {table}; take all five files from one place")
        yield split, ({item_id: items[item_id] for item_id in ids}, pairs)


# ---------------------------------------------------------------------------------------------------------------------
# EMBer: a row a pair with both items in full, `…_left` and `…_right`


def parquet_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a parquet file. pyarrow is not among our requirements; nothing else here needs it."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("reading parquet needs pyarrow; pip install pyarrow into the environment you run") from error
    if not path.is_file():
        raise UserError(f"{path}: missing; the folder needs train.parquet, val.parquet and the test file you name")
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


def read_ember(folder: Path, test: str) -> Iterator[tuple[str, Split]]:
    """Train, valid, and as test the file named `test`: test_om shares no product with the others."""
    for split, name in {**EMBER_FILES, "test": test}.items():
        items: dict[str, Row] = {}
        pairs = []
        for row in parquet_rows(folder / f"{name}.parquet"):
            for side in ("left", "right"):
                item_id = str(row[f"id_{side}"])
                title, attributes = str(row[f"title_{side}"] or ""), str(row[f"pv_pairs_{side}"] or "")
                items[item_id] = info_of(item_id, title, attributes, str(row[f"cate_name_{side}"] or ""))
            pairs.append(Pair(str(row["id_left"]), str(row["id_right"]), int(row["label"])))
        yield split, (items, pairs)


# ---------------------------------------------------------------------------------------------------------------------


def write_split(data_dir: Path, split: str, found: Split) -> None:
    """The info file and the pair file of a split."""
    items, pairs = found
    with publish(item_file(data_dir, split)) as file:
        file.writelines(orjson.dumps(row) + b"\n" for row in items.values())
    with publish(pair_file(data_dir, split)) as file:
        file.writelines(map(pair_row, pairs))
    num_same = sum(pair.label == 1 for pair in pairs)
    print(f"{split}: {len(items):,} items, {len(pairs):,} pairs, {num_same:,} the same product")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layout", choices=("deepmatcher", "ember"))
    parser.add_argument("source", type=Path, help="the folder with the published files")
    parser.add_argument("out", type=Path, help="the data folder to write")
    parser.add_argument("--test", default="test_om", help="EMBer's file that becomes test (default: test_om)")
    arguments = parser.parse_args()
    is_ember = arguments.layout == "ember"
    try:
        splits = read_ember(arguments.source, arguments.test) if is_ember else read_deepmatcher(arguments.source)
        arguments.out.mkdir(parents=True, exist_ok=True)
        for split, found in splits:
            write_split(arguments.out, split, found)
    except UserError as error:
        sys.exit(f"text_pairs: {error}")


if __name__ == "__main__":
    main()
