"""What one pair's verdict rests on: its score with pictures, texts, attributes and patches taken away, as a page.

`./entrypoint.sh explain --pair A B --data data --split test --model weights/model.safetensors --out explain.html`
Plain occlusion (Zeiler & Fergus, arXiv 1311.2901): each listing is encoded anew for every part that is taken away,
grid x grid patches of its picture among them. What two parts do together, no single one of them shows.
The pair's probability is calibrated on other pairs of the split, where they have labels.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tongkuan.base.calibration import AS_TRAINED, fit_platt, probabilities, shortage
from tongkuan.base.errors import UserError, clip, nearest
from tongkuan.base.files import check_writable, publish, sha256_of
from tongkuan.encode.encode import Embeddings, distinct_items, scores_of, slow_precision
from tongkuan.encode.inference import Inference, open_inference
from tongkuan.encode.store import ItemStore
from tongkuan.model.towers import pair_scores
from tongkuan.records.attribute_syntax import canonical
from tongkuan.records.attributes import attributes_of, item_text, normalise
from tongkuan.records.items import Item, Pair, read_pairs
from tongkuan.records.labels import labels_of, pair_key
from tongkuan.records.rows import is_given
from tongkuan.report.explained import Basis, Effect, Explanation, Patches, render_explanation
from tongkuan.report.views import Pictures
from tongkuan.settings import ModelSettings, Precision

WHOLE, PICTURE, TEXT, TITLE = "as it is", "picture", "title and attributes", "title"
MAX_LABELLED = 200  # pairs to calibrate by: their listings cost about twice as long as those of the pair itself


@dataclass(frozen=True, slots=True)
class Variant:
    """A listing as the model is shown it: a text, a picture uint8 (3, S, S) or None, and what words are taken of."""

    text: str
    image: NDArray[np.uint8] | None
    item: Item


class VariantStore(ItemStore):
    """Variants by a name of ours, instead of items by id."""

    def __init__(self, variants: Mapping[str, Variant], settings: ModelSettings, tokenizer: Tokenizer | None) -> None:
        super().__init__({name: variant.item for name, variant in variants.items()}, Path(), settings, tokenizer)
        self.variants = variants

    def text(self, item_id: str) -> str:
        return self.variants[item_id].text

    def image(self, item_id: str) -> NDArray[np.uint8] | None:
        return self.variants[item_id].image


def explain(
    pair_ids: Sequence[str] | None,
    data_dir: Path,
    split: str,
    model_path: Path,
    out: Path,
    threshold: float | None = None,
    precision: Precision | None = None,
    grid: int = 8,
) -> None:
    """Publish the page of a pair (two item ids; the first of the split when None). UserError when an input is unfit."""
    if out.suffix != ".html" or out.is_dir():
        raise UserError(f"{out}: no name for a page; let --out end in .html")
    check_writable(out.parent)
    started = time.monotonic()
    found = occlude(pair_ids, data_dir, split, model_path, threshold, precision, grid)
    if found is None:
        return
    explanation, notes = found
    seconds = time.monotonic() - started
    page = render_explanation(explanation, Pictures(data_dir))
    with publish(out) as file:
        file.write(page)
    print(f"{out}: {explanation.pair.left} and {explanation.pair.right}: {explanation}")
    count = explanation.facts["listings encoded"]
    print(f"{count} listings encoded in {seconds:.1f} s, the model's loading included; a prediction encodes 2")
    print("\n".join([*notes, "next: open it in a browser; it needs no network"]))


def occlude(
    pair_ids: Sequence[str] | None,
    data_dir: Path,
    split: str,
    model_path: Path,
    threshold: float | None,
    precision: Precision | None,
    grid: int,
) -> tuple[Explanation, list[str]] | None:
    """Encode both listings whole and without each part; what came of it, and lines for the user.

    Every rank takes part; None on all but the first.
    """
    with open_inference(
        data_dir, split, model_path, precision, read=lambda *files: find_pairs(pair_ids, *files)
    ) as run:
        items, settings, (pair, *labelled) = run.items, run.card.settings, run.pairs
        if not 1 <= grid <= settings.image.size:
            raise UserError(
                f"--grid {grid}: name a number of patches from 1 to {settings.image.size}, the picture's pixels"
            )
        sides = [variants_of(run.store, items[item_id], grid) for item_id in (pair.left, pair.right)]
        variants = {f"{side} {name}": variant for side, found in enumerate(sides) for name, variant in found.items()}
        notes = [slow_precision(run.ranks.device, run.precision), run.store.warning()]
        basis = calibrate(run, labelled)
        run.store, run.item_ids = VariantStore(variants, settings, run.card.open_tokenizer()), list(variants)
        numbers = run.encode("explain")
    if not run.ranks.is_first:
        return None
    left, right = ({name: numbers[f"{side} {name}"] for name in found} for side, found in enumerate(sides))
    whole = (left[WHOLE], right[WHOLE])
    adaptive, commodity = (
        a @ b for a, b in zip(*(np.split(each.astype(np.float64), 2) for each in whole), strict=True)
    )
    plain = score(*whole)
    explanation = Explanation(
        pair=pair,
        items=(items[pair.left], items[pair.right]),
        style=settings.attributes,
        score=plain,
        commodity=float(commodity),
        adaptive=float(adaptive),
        threshold=run.card.threshold if threshold is None else threshold,
        probability=float(probabilities(np.array([plain]), basis.scaling)[0]),
        basis=basis,
        effects=list(effects(left, right)),
        patches=(
            patches(sides[0], grid, {name: score(numbers, whole[1]) - plain for name, numbers in left.items()}),
            patches(sides[1], grid, {name: score(whole[0], numbers) - plain for name, numbers in right.items()}),
        ),
        facts={
            "model": sha256_of(model_path),
            "precision": run.precision,
            "split": split,
            "grid": f"{grid} x {grid}",
            "listings encoded": f"{len(variants) + basis.num_encoded:,}",
        },
    )
    return explanation, [*filter(None, notes)]


def find_pairs(pair_ids: Sequence[str] | None, path: Path, items: Mapping[str, Item], items_path: Path) -> list[Pair]:
    """The pair, with its label when the split's file has it, whichever way round; then the others with a label.

    Of more than MAX_LABELLED others, that many drawn at random, the same ones every time.
    """
    pairs = read_pairs(path, labels="optional") if pair_ids is None or is_given(path) else []
    left, right = pair_ids or (pairs[0].left, pairs[0].right)
    for item_id in (left, right):
        if item_id not in items:
            hint = nearest(item_id, items)
            raise UserError(f"{items_path}: no item {clip(item_id)}{hint}; name two item_ids of this file")
    pair = Pair(left, right)
    own = [found.label for found in pairs if pair_key(found) == pair_key(pair)]
    others = [
        found
        for found in pairs
        if found.label is not None and pair_key(found) != pair_key(pair) and {found.left, found.right} <= items.keys()
    ]
    if len(others) > MAX_LABELLED:
        drawn = np.random.default_rng(0).choice(len(others), MAX_LABELLED, replace=False)
        others = [others[number] for number in sorted(drawn)]
    return [replace(pair, label=own[0] if own else None), *others]


def calibrate(run: Inference, pairs: Sequence[Pair]) -> Basis:
    """What the probability rests on: the labelled pairs, or nothing, and then none of their listings is encoded."""
    source, labels = run.files["pairs"].name, labels_of(pairs)
    if why := shortage(labels):
        return Basis(AS_TRAINED, source, 0, 0, why)
    run.item_ids = distinct_items(pairs)
    embeddings = run.encode("calibrate")
    return Basis(fit_platt(scores_of(pairs, embeddings), labels), source, len(pairs), len(embeddings), "")


def variants_of(store: ItemStore, item: Item, grid: int) -> dict[str, Variant]:
    """The listing whole, and without each part that it has and the model looks at."""
    settings = store.settings
    keys, style = settings.attribute_keys, settings.attributes
    text, image = item_text(item, keys, style), store.image(item.item_id)
    found = {WHOLE: Variant(text, image, item)}
    if image is not None:
        found[PICTURE] = Variant(text, None, item)
    if settings.inputs != "image" and text:
        found[TEXT] = Variant("", image, replace(item, title="", item_attributes="", sku_attributes=""))
        if item.title:
            untitled = replace(item, title="")
            found[TITLE] = Variant(item_text(untitled, keys, style), image, untitled)
        present = attributes_of(item, style)
        for key in keys:
            if normalise(key) in present:
                said = [(name, value) for name, values in present.items() for value in values]
                left = canonical([pair for pair in said if pair[0] != normalise(key)])
                bare = replace(item, item_attributes=left, sku_attributes="")
                found[key] = Variant(item_text(item, [other for other in keys if other != key], style), image, bare)
    if image is not None:
        grey = np.array(settings.image.mean).reshape(3, 1, 1) * 255  # what a missing picture is, too
        for row, column, place in cells(image.shape[1], grid):
            covered = image.copy()
            covered[place] = np.broadcast_to(grey, covered[place].shape).round()
            found[patch_name(row, column)] = Variant(text, covered, item)
    return found


def cells(size: int, grid: int) -> Iterator[tuple[int, int, tuple[slice, slice, slice]]]:
    """(row, column, where it is in a picture (3, size, size)) of every patch."""
    edges = np.linspace(0, size, grid + 1).round().astype(int)
    for row in range(grid):
        for column in range(grid):
            rows, columns = (slice(edges[at], edges[at + 1]) for at in (row, column))
            yield row, column, (slice(None), rows, columns)


def patch_name(row: int, column: int) -> str:
    return f"patch {row} {column}"


def score(left: Embeddings, right: Embeddings) -> float:
    """Of two embeddings [p ; q] (2D,)."""
    return float(pair_scores(left[None], right[None])[0])


def effects(left: Mapping[str, Embeddings], right: Mapping[str, Embeddings]) -> Iterator[Effect]:
    """For each part but patches: the score without it on the left, on the right, and on both sides."""
    for name in dict.fromkeys([*left, *right]):
        if name == WHOLE or name.startswith("patch "):
            continue
        a, b = left.get(name), right.get(name)
        yield Effect(
            name,
            None if a is None else score(a, right[WHOLE]),
            None if b is None else score(left[WHOLE], b),
            score(left[WHOLE] if a is None else a, right[WHOLE] if b is None else b),
        )


def patches(side: Mapping[str, Variant], grid: int, changes: Mapping[str, float]) -> Patches | None:
    """What covering each patch of a side changes; None without a picture."""
    image = side[WHOLE].image
    if image is None:
        return None
    found = np.array([[changes[patch_name(row, column)] for column in range(grid)] for row in range(grid)])
    return Patches(image, found)
