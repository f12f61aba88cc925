"""Augmentation is the same whatever a run is cut into: paddings, parts, ranks."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from worlds import tiny_settings

from tongkuan.learn.augment import augment
from tongkuan.learn.batches import parts
from tongkuan.learn.dataloader import load_parts, load_task
from tongkuan.learn.step import TrainStep
from tongkuan.model.towers import build
from tongkuan.ranks.group import Ranks
from tongkuan.settings import Augmentation

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
MAX_TOKENS = 24


def kept_tokens(rows: list[int], width: int, seed: int = 1, step: int = 5) -> torch.Tensor:
    """The mask (N, width) of rows whose texts fill the width."""
    images, mask = torch.zeros(len(rows), 3, 2, 2), torch.ones(len(rows), width, dtype=torch.int64)
    return augment(images, mask, Augmentation(drop_text=0.3), seed, step, rows, 16, MAX_TOKENS)[1]


@given(
    st.lists(st.integers(0, 15), min_size=1, max_size=6, unique=True),
    st.integers(1, MAX_TOKENS),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_a_row_keeps_the_same_tokens_at_every_padding(rows: list[int], width: int, seed: int, step: int) -> None:
    whole = kept_tokens(list(range(16)), MAX_TOKENS, seed, step)
    assert torch.equal(kept_tokens(rows, width, seed, step), whole[rows, :width])
    assert (whole == 0).any() and (whole[:, 0] == 1).all()


@pytest.mark.parametrize(("count", "accumulate"), [(1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_an_item_loses_the_same_tokens_on_any_ranks(data: Path, tmp_path: Path, count: int, accumulate: int) -> None:
    """Texts differ in length here, so that parts are padded to widths of their own."""
    settings = tiny_settings(tmp_path, "train.pairs=8", "train.augmentation.drop_text=0.3")
    task, options = load_task(settings, data), settings.train

    def kept(count: int, accumulate: int) -> dict[tuple[int, str], list[int]]:
        """Places of the tokens that are left, by step and item."""
        found = {}
        cut = options.model_copy(update={"accumulate": accumulate})
        for rank in range(count):
            for part in parts(task.train_pairs, cut, Ranks(rank, count, CPU), 0):
                batch = task.train_store.batch(part.item_ids)
                images = torch.zeros(len(part.item_ids), 3, 1, 1)
                _, mask = augment(
                    images,
                    batch.mask,
                    options.augmentation,
                    0,
                    part.step,
                    part.rows,
                    16,
                    settings.model.text.max_tokens,
                )
                found |= {
                    (part.step, item_id): row.nonzero().flatten().tolist()
                    for item_id, row in zip(part.item_ids, mask, strict=True)
                }
        return found

    assert kept(count, accumulate) == kept(1, 1)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_parts_of_a_step_lose_what_the_whole_step_loses(data: Path, tmp_path: Path, accumulate: int) -> None:
    losses = []
    for cut in (1, accumulate):
        settings = tiny_settings(tmp_path, f"train.accumulate={cut}", "train.augmentation.drop_text=0.3")
        task = load_task(settings, data)
        torch.manual_seed(0)
        learner = TrainStep(build(settings.model, task.card.text_config, pretrained=True), settings, ALONE)
        loaded = load_parts(task, settings, ALONE, 0, task.train_store)
        losses.append([float(learner.take(step, loaded)[0]) for step in range(4)])
        loaded.close()
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
