"""Whether a GPU gives the CPU's numbers, what each arithmetic costs in verdicts, and what recomputing changes."""

import copy
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_sections.bench import WAYS, Bench, arithmetic, prepared
from gpu_sections.book import Page, free
from tongkuan.encode.encode import Embeddings, encode, scores_of
from tongkuan.learn.dataloader import load_parts
from tongkuan.learn.features import RawFeatures
from tongkuan.learn.step import TrainStep
from tongkuan.model.towers import checkpoint_activations
from tongkuan.ranks.arithmetic import DTYPES
from tongkuan.ranks.group import Ranks
from tongkuan.records.items import Pair
from tongkuan.settings import DataSettings, Precision

COMPARED = 16  # items on both devices
TWICE = 2  # pairs an item
WITH_RANDOM_WEIGHTS = "random weights: scores lie closer together than a trained model's, so more verdicts differ"


def right(bench: Bench, page: Page) -> None:
    """Three comparisons, each by itself."""
    for name, compare in {"on both devices": devices, "verdicts": verdicts, "recomputing": recomputing}.items():
        if page.has_time(name):
            with page.trying(name):
                compare(bench, page)


def devices(bench: Bench, page: Page) -> None:
    """Largest difference of a number from a CPU at fp32, at fp32 and with products and convolutions in TF32."""
    few = bench.made.few(COMPARED)
    cpu = Ranks(0, 1, torch.device("cpu"))
    data, ids = DataSettings(), list(few.items)
    alone = DataSettings(encode_batch=1)  # one for each core
    expected = encode(copy.deepcopy(few.model).to(cpu.device), few.store(), ids, alone, cpu, label="on the CPU")
    size = float(np.sqrt(np.mean(np.square([*expected.values()]))))
    ways: tuple[Precision, ...] = ("fp32", "tf32")
    for way in ways:
        found = encode(prepared(bench, way), few.store(), ids, data, bench.ranks, way)
        worst = max(float(np.abs(found[item_id] - expected[item_id]).max()) for item_id in ids)
        page.measured(
            f"{way}: largest difference from a CPU's fp32",
            worst,
            note=f"{worst / size:.1e} of the numbers' size; {len(ids)} items",
        )


def verdicts(bench: Bench, page: Page) -> None:
    """Verdicts at the median score that differ from fp32's, with the head in fp32 and halved as well."""
    pairs = [Pair(*sides) for sides in two_each(list(bench.made.items))]
    exact: NDArray[np.float64] | None = None
    for way in WAYS:
        for is_halved in (False, True) if way in ("bf16", "fp16") else (False,):
            name = f"{way}{', head halved' if is_halved else ''}: verdicts that differ"
            if not page.has_time(name):
                return
            scores = scores_of(pairs, embeddings(bench, way, is_halved))
            if exact is None:
                exact = scores
                continue
            threshold = float(np.median(exact))
            different = int(((scores > threshold) != (exact > threshold)).sum())
            change = float(np.abs(scores - exact).max() / exact.std())
            note = f"of {len(pairs)}; largest change {change:.2g} of the scores' deviation; {WITH_RANDOM_WEIGHTS}"
            page.measured(name, different, "verdicts", note)


def two_each(ids: list[str]) -> Iterator[tuple[str, str]]:
    """Each item beside its next one and beside one far away."""
    for step in (1, len(ids) // TWICE + 1):
        for place, item_id in enumerate(ids):
            yield item_id, ids[(place + step) % len(ids)]


def embeddings(bench: Bench, way: Precision, is_halved: bool) -> dict[str, Embeddings]:
    """Of all items, the heads' own arithmetic apart from the encoders'."""
    with arithmetic(way) as precision:
        model = prepared(bench, precision)
        rows = encode(
            RawFeatures(model), bench.made.store(), list(bench.made.items), DataSettings(), bench.ranks, precision
        )
        raw = torch.from_numpy(np.stack([*rows.values()])).to(bench.device)
        found = joined(bench, raw, DTYPES[way] if is_halved else torch.float32)
    return dict(zip(rows, found, strict=True))


def joined(bench: Bench, raw: torch.Tensor, dtype: torch.dtype) -> Embeddings:
    """[p ; q] of raw features (N, both towers' widths), by heads of a type."""
    heads = bench.made.model.heads()
    parts = raw.split([trunk.width for trunk, _ in heads], dim=1)
    with torch.inference_mode():
        halves = [copy.deepcopy(head).to(dtype)(part.to(dtype)) for (_, head), part in zip(heads, parts, strict=True)]
        found: Embeddings = torch.cat(halves, dim=1).float().cpu().numpy()
    return found


def recomputing(bench: Bench, page: Page) -> None:
    """Loss and gradients of one part with activations kept and computed again."""
    kept, again = (gradients(bench, recompute) for recompute in (False, True))  # without dropout
    worst = max(float((one - other).abs().max()) for one, other in zip(kept[1], again[1], strict=True))
    largest = max(float(one.abs().max()) for one in kept[1])
    page.measured("recomputing: change of the loss", abs(kept[0] - again[0]), note=f"loss {kept[0]:.6f}; fp32")
    page.measured("recomputing: largest change of a gradient", worst, note=f"largest gradient {largest:.3g}")


def gradients(bench: Bench, recompute: bool) -> tuple[float, list[torch.Tensor]]:
    """(loss, every gradient on the CPU) of the first part."""
    model = prepared(bench, "fp32").train()
    if recompute:
        checkpoint_activations(model)
    train = bench.settings.train.model_copy(update={"pairs": min(4, bench.settings.train.pairs), "precision": "fp32"})
    settings = bench.settings.model_copy(update={"train": train})
    loaded = load_parts(bench.task, settings, bench.ranks, 0, bench.task.train_store)
    part, batch, labels = next(loaded)
    loaded.close()
    with arithmetic("fp32"):
        loss = TrainStep(model, settings, bench.ranks).part_loss(part, batch.to(bench.device), labels)
        loss.backward()
    found = [parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None]
    del model
    free()
    return float(loss.detach()), found
