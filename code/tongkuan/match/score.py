"""How right the groups of a catalogue are, by labelled pairs.

`./entrypoint.sh match score --out match --pairs data/item_valid_pair.jsonl`
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb
from pathlib import Path

import pyarrow.parquet as pq

from tongkuan.base.errors import UserError, entrypoint, missing
from tongkuan.base.metrics import Quality
from tongkuan.learn.batches import products_of
from tongkuan.match.files import Folder
from tongkuan.records.items import Item, read_pairs


def match_score(out_dir: Path, pairs_path: Path) -> float:
    """Print the figures of the groups and return their F1. UserError when an item of the pairs is in no group.

    Items that pairs labelled the same join, directly or through others, are one product; all others are different ones.
    """
    folder = Folder(out_dir)
    if not folder.manifest.is_file():
        raise missing(folder.manifest, f"run {entrypoint('match', 'run', '--out', out_dir)}")
    table = pq.read_table(folder.groups, columns=["item_id", "group_id"])
    group_of = dict(zip(*(table[name].to_pylist() for name in ("item_id", "group_id")), strict=True))
    items = {item_id: Item(item_id) for item_id in group_of}
    product_of = products_of(read_pairs(pairs_path, items, items_path=folder.groups))
    quality = quality_of([group_of[item_id] for item_id in product_of], list(product_of.values()))
    if not quality.true_positives + quality.false_negatives:
        raise UserError(f"{pairs_path}: no pair is labelled the same; groups cannot be scored by it")
    products = len(set(product_of.values()))
    print(f"groups: {quality} on all pairs of {len(product_of):,} labelled listings of {products:,} products")
    print(f"next: open {folder.page} in a browser")
    return quality.f1


def quality_of(groups: Sequence[Hashable], products: Sequence[Hashable]) -> Quality:
    """Of all pairs of N listings: whether they are in one group, against whether they are one product."""
    called, same, both = (
        sum(comb(count, 2) for count in Counter(kinds).values())
        for kinds in (groups, products, zip(groups, products, strict=True))
    )
    return Quality(both, called - both, same - both, comb(len(groups), 2) - called - same + both)
