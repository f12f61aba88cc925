"""one.py: the score is the sum that it claims to be, and what a side lacks says nothing."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import random_inputs
from torch import Tensor
from torch.nn.functional import cosine_similarity
from worlds import ONE, tiny_settings

from tongkuan.encode.store import ItemStore, normalised, padded_words
from tongkuan.model.encoders import build_tokenizer, text_config_of
from tongkuan.model.one import OneTower, mix, sums, sums_in_order
from tongkuan.model.towers import build, pair_scores
from tongkuan.model.trunk import ItemModel
from tongkuan.records.items import Item
from tongkuan.records.words import BUCKETS, KINDS, Word

WIDE = (*ONE, "model.embedding_size=512", "model.parts={text: 4, image: 4, object_colour: 6, whole_colour: 6, keys: 3}")
VOCABULARY = 30  # tokens
FIRST_KEY = len(KINDS)  # group of the first slot
KEYS = (7, 11, 13)  # buckets of the keys that have slots


def built(folder: Path, *overrides: str) -> ItemModel:
    """A model in evaluation mode, its encoders random."""
    settings = tiny_settings(folder, *overrides).model
    torch.manual_seed(0)
    text_config = text_config_of(settings.text, VOCABULARY) if settings.has_text else None
    return build(settings, text_config, pretrained=True).eval()


@pytest.fixture
def tower(tmp_path: Path) -> OneTower:
    """All parts, keys with slots, and weights of which no two are the same."""
    tower, generator = built(tmp_path, *WIDE), torch.Generator().manual_seed(1)
    assert isinstance(tower, OneTower) and tower.words is not None
    with torch.no_grad():
        assert tower.trunk.image is not None
        for parameter in tower.trunk.image.parameters():
            parameter.add_(0.1)  # or it would say nothing of nothing by itself
        for number, projection in enumerate(tower.projections.values()):
            projection.scale.fill_(0.7 + 0.2 * number)
            projection.lack.fill_(0.3 + 0.1 * number)
        tower.words.idf.copy_(torch.rand(BUCKETS, generator=generator) + 0.5)
        tower.words.generic.copy_(torch.randn(BUCKETS, generator=generator) / 8)
        tower.words.scales.copy_(torch.arange(len(tower.words.scales)) / 4 + 0.5)
        tower.words.lack.copy_(torch.arange(1, len(tower.words.lack) + 1) / 8)
        tower.words.usual.copy_(torch.tensor([0.4, -0.3, 0.2, 0.1]))
        for slot, key in enumerate(KEYS):
            tower.words.group_of[FIRST_KEY + key] = FIRST_KEY + slot
        tower.bias.copy_(torch.tensor([0.8, 1.3]))
    return tower


def apart(size: int, count: int) -> list[int]:
    """Buckets that the sketch puts in numbers of their own, so that it is exact."""
    places = ((mix(torch.arange(1000)) >> 1) % size).tolist()
    return list({place: number for number, place in reversed([*enumerate(places)])}.values())[:count]


@dataclass
class Listings:
    """Some items as a model is shown them."""

    images: Tensor
    ids: Tensor
    mask: Tensor
    words: list[list[Word]] = field(default_factory=list)

    def embedded(self, tower: ItemModel) -> np.ndarray:
        """float32 (N, 2D)."""
        words = padded_words(self.words) if self.words else ()
        with torch.inference_mode():
            return np.asarray(tower(self.images, self.ids, self.mask, *words).numpy())

    def score(self, tower: ItemModel, left: int = 0, right: int = 1) -> float:
        rows = self.embedded(tower)
        return float(pair_scores(rows[left : left + 1], rows[right : right + 1])[0])


@pytest.fixture
def listings(tower: OneTower) -> Listings:
    """Three with pictures and texts; words of all kinds, and of two or three keys each."""
    assert tower.words is not None
    free = iter(apart(tower.words.size, 40))
    common = [Word(next(free), owner) for owner in (0, 1, 2, 3, FIRST_KEY + KEYS[0])]
    words = []
    for keys in ((KEYS[1], KEYS[2]), (KEYS[1],), (5, KEYS[2])):
        owners = (0, 0, 1, 2, *(FIRST_KEY + key for key in keys))
        words.append(common + [Word(next(free), owner) for owner in owners])
    images, ids, mask = random_inputs()
    return Listings(images, ids, mask, words)


def unit(words: list[Word], group: int, tower: OneTower) -> dict[int, float]:
    """tf-idf of one group of words by bucket, of norm 1."""
    assert tower.words is not None
    groups, idf = tower.words.group_of, tower.words.idf
    own = {word.bucket: float(idf[word.bucket]) for word in words if groups[word.owner] == group}
    norm = sum(weight**2 for weight in own.values()) ** 0.5
    return {bucket: weight / norm for bucket, weight in own.items()}


def claimed(tower: OneTower, listings: Listings, left: int, right: int) -> float:
    """The score by its terms: cosines of parts, of kinds and keys, keys on both sides, how common, the bias."""
    assert tower.words is not None
    with torch.inference_mode():
        raw = tower.raw(listings.images, listings.ids, listings.mask)
        score = float(tower.bias[1] ** 2 - tower.bias[0] ** 2) + 1
        for name, projection in tower.projections.items():
            if raw[name][left].any() and raw[name][right].any():
                vectors = projection.linear(raw[name]).double()
                score += float(projection.scale) ** 2 * float(cosine_similarity(vectors[left], vectors[right], dim=0))
                score -= float(projection.lack) ** 2
        for group, scale in enumerate(tower.words.scales.tolist()):
            a, b = (unit(listings.words[side], group, tower) for side in (left, right))
            score += scale**2 * sum(weight * b.get(bucket, 0) for bucket, weight in a.items())
            if a and b:
                score -= float(tower.words.lack[group]) ** 2
            for side in (a, b):
                score -= float(tower.words.usual[group]) if side and group < FIRST_KEY else 0
                score += sum(weight * float(tower.words.generic[bucket]) for bucket, weight in side.items())
    return score


# ---------------------------------------------------------------------------------------------------------------------
# The score


@pytest.mark.parametrize(("left", "right"), [(0, 1), (0, 2), (1, 2), (1, 1)])
def test_the_score_is_the_sum_of_what_each_part_says(
    tower: OneTower, listings: Listings, left: int, right: int
) -> None:
    expected = claimed(tower, listings, left, right)
    assert listings.score(tower, left, right) == pytest.approx(expected, abs=1e-4)
    assert listings.score(tower, right, left) == listings.score(tower, left, right)


def test_words_that_share_a_number_of_the_sketch_add_little_noise(tower: OneTower, listings: Listings) -> None:
    """300 words a listing, 100 of them the same, in some 490 numbers."""
    assert tower.words is not None
    generator = np.random.default_rng(0)
    drawn = [[Word(int(bucket), 0) for bucket in generator.integers(0, BUCKETS, 200)] for _ in range(3)]
    listings.words = [sorted({*own, *drawn[2][:100]}) for own in drawn]
    noise = tower.words.scales.tolist()[0] ** 2 / tower.words.size**0.5
    assert abs(listings.score(tower) - claimed(tower, listings, 0, 1)) < 4 * noise


def test_the_sketch_is_the_same_on_any_machine() -> None:
    """Vectors of one model from two machines must be of one space."""
    assert mix(torch.tensor([0, 1, 2, 1000, BUCKETS - 1])).tolist() == [0, 74326147, 888595433, 1898464936, 1999875614]


@pytest.mark.parametrize("more", [(), ("model.inputs=text",), ("model.inputs=image",), ("model.parts.views=3",)])
def test_an_embedding_has_the_numbers_of_two_halves(tmp_path: Path, more: tuple[str, ...]) -> None:
    tower = built(tmp_path, *ONE, *more)
    words = [[Word(1, 0)]] * 3 if tower.words is not None else []  # type: ignore[union-attr]
    embeddings = Listings(*random_inputs(), words).embedded(tower)
    assert embeddings.shape == (3, 2 * 64) and np.isfinite(embeddings).all()


@pytest.mark.parametrize(("inputs", "ignored"), [("text", "images"), ("image", "ids"), ("image", "words")])
def test_one_input_alone_ignores_the_other(tmp_path: Path, inputs: str, ignored: str) -> None:
    tower = built(tmp_path, *ONE, f"model.inputs={inputs}")
    words = [[Word(place, 0)] for place in range(3)] if inputs == "text" else []
    before, after = (Listings(*random_inputs(), words) for _ in range(2))
    if ignored == "words":
        assert getattr(tower, "words") is None  # noqa: B009
    else:
        setattr(after, ignored, getattr(after, ignored) + 1)
    assert np.array_equal(before.embedded(tower), after.embedded(tower))


# ---------------------------------------------------------------------------------------------------------------------
# What a side lacks


def changed(tower: OneTower, part: str) -> OneTower:
    """The tower with another projection of a part, that weighs more."""
    with torch.no_grad():
        projection = tower.projections[part]
        projection.linear.weight.neg_().roll(1, 0)
        projection.scale.fill_(5.0)
    return tower


def without_picture(listings: Listings) -> None:
    listings.images[0] = 0


def without_text(listings: Listings) -> None:
    listings.mask[0, 2:] = 0


@pytest.mark.parametrize(
    ("lose", "parts"), [(without_picture, ("image", "object_colour", "whole_colour")), (without_text, ("text",))]
)
def test_what_a_side_lacks_is_zeros_and_does_not_count(
    tower: OneTower, listings: Listings, lose: Callable[[Listings], None], parts: tuple[str, ...]
) -> None:
    for part in parts:
        before = listings.score(tower)
        assert listings.score(changed(tower, part)) != pytest.approx(before, abs=0.1)
    lose(listings)
    raw = tower.raw(listings.images, listings.ids, listings.mask)
    assert all(not raw[part][0].any() and raw[part][1].any() for part in parts)
    score = listings.score(tower)
    assert score == pytest.approx(claimed(tower, listings, 0, 1), abs=1e-4)
    for part in parts:
        assert listings.score(changed(tower, part)) == pytest.approx(score, abs=1e-6)


def test_a_listing_with_nothing_at_all_has_finite_numbers(tower: OneTower, listings: Listings) -> None:
    without_picture(listings)
    without_text(listings)
    listings.words[0] = []
    assert np.isfinite(listings.embedded(tower)).all()


def test_a_key_adds_where_equal_takes_away_where_not_and_is_silent_where_a_side_lacks_it(
    tower: OneTower, listings: Listings
) -> None:
    assert tower.words is not None
    with torch.no_grad():
        tower.words.generic.zero_()
        tower.words.scales[FIRST_KEY + 1] = 1.5
        tower.words.lack[FIRST_KEY + 1] = 0.5
    at, *others = apart(tower.words.size, 3)
    title, (red, blue) = Word(at, 0), (Word(bucket, FIRST_KEY + KEYS[1]) for bucket in others)

    def score(*said: list[Word]) -> float:
        listings.words = [sorted([title, *own]) for own in (*said, [])]
        return listings.score(tower)

    neither = score([], [])
    assert score([red], []) == score([], [blue]) == pytest.approx(neither, abs=1e-5)
    assert score([red], [red]) == pytest.approx(neither + 1.5**2 - 0.5**2, abs=1e-5)
    assert score([red], [blue]) == pytest.approx(neither - 0.5**2, abs=1e-5)
    assert score([red], [blue]) < neither < score([red, blue], [blue]) < score([red], [red])


def test_a_key_without_a_slot_says_nothing(tower: OneTower, listings: Listings) -> None:
    before = listings.embedded(tower)
    listings.words[0] = [*listings.words[0], Word(999, FIRST_KEY + 5)]
    assert np.array_equal(listings.embedded(tower), before)


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def test_a_tower_without_encoders_has_none(tmp_path: Path) -> None:
    tower = built(tmp_path, *ONE, "model.parts.text=0", "model.parts.image=0")
    assert tower.encoders("text") == tower.encoders("image") == []
    assert [*tower.projections] == ["object_colour", "whole_colour"]  # type: ignore[arg-type]


def test_two_views_of_a_picture_do_not_tell_which_way_it_looks(tmp_path: Path) -> None:
    images, ids, mask = random_inputs()
    for views, is_same in ((1, False), (2, True), (3, False)):
        tower = built(tmp_path, *ONE, f"model.parts.views={views}")
        assert isinstance(tower, OneTower)
        with torch.inference_mode():
            seen, mirrored = (tower.raw(each, ids, mask)["image"] for each in (images, images.flip(3)))
        assert torch.allclose(seen, mirrored, atol=1e-5) is is_same


def test_words_are_summed_on_a_gpu_as_on_a_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 40, generator=generator).requires_grad_()
    place = torch.randint(0, 7, (5, 40), generator=generator)
    expected = torch.stack([(values * (place == number)).sum(dim=1) for number in range(9)], dim=1)
    torch.testing.assert_close(sums(values, place, 9), expected)
    torch.testing.assert_close(sums_in_order(values, place, 9), expected)
    (sums_in_order(values, place, 9) * torch.arange(9)).sum().backward()
    assert torch.equal(values.grad, place.float())


def test_colours_are_counted_at_full_precision_under_autocast(tower: OneTower) -> None:
    with torch.inference_mode():
        exact = tower.raw(*random_inputs())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lower = tower.raw(*random_inputs())
    for name in ("object_colour", "whole_colour"):
        assert torch.equal(lower[name], exact[name])


def test_padding_of_a_batch_changes_no_item(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, *ONE).model
    titles = ("杯", "正品 红色 水杯 大 号 送 礼 物", "运动 鞋 aj5909-001 男")
    items = {title: Item(title, title=title, item_attributes=f"型号:{title[:2]}1") for title in titles}
    tokenizer = build_tokenizer(settings.text, titles)
    torch.manual_seed(0)
    tower = build(settings, text_config_of(settings.text, tokenizer.get_vocab_size()), pretrained=True).eval()
    store = ItemStore(items, tmp_path, settings, tokenizer)

    def embedded(*item_ids: str) -> Tensor:
        batch = store.batch(item_ids)
        with torch.inference_mode():
            rows: Tensor = tower(normalised(batch, settings.image), batch.ids, batch.mask, *batch.words)
        return rows

    together, alone = embedded(*titles), torch.cat([embedded(title) for title in titles])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)
