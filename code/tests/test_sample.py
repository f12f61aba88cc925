"""The sample catalogue: same seed, same bytes; every promised disorder; neither text nor picture gives labels away."""

import io
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest
from commands import run_verb
from PIL import Image
from worlds import snapshot

from data_scripts import sample
from data_scripts import sample_words as words
from tongkuan.base.errors import UserError
from tongkuan.cli.options import PRODUCTS
from tongkuan.cli.verbs import main
from tongkuan.records.attributes import item_text, normalise, parse_attributes
from tongkuan.records.items import parse_item, read_items, read_pairs

SPLITS = ("train", "valid", "test")
LOOK = ("category", "shape", "colour", "pattern")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    assert main(["sample", "--raw", str(folder), "--products", "24"]) == 0
    return folder


@pytest.fixture(scope="module")
def default_plan() -> Any:
    return sample.plan(PRODUCTS.default)


def pictures(raw: Path, split: str) -> dict[str, bytes]:
    """File name -> bytes, from whichever container the split comes in."""
    name = f"item_{split}_images"
    if (raw / name).is_dir():
        return {path.name: path.read_bytes() for path in (raw / name).iterdir()}
    parts = sorted(raw.glob(f"{name}.zip.part*")) or [raw / f"{name}.zip"]
    with zipfile.ZipFile(io.BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
        return {entry.split("/")[1]: archive.read(entry) for entry in archive.namelist()}


def decodes(content: bytes) -> bool:
    try:
        Image.open(io.BytesIO(content)).load()
    except OSError:
        return False
    return True


def texts(listing: Any) -> str:
    return "".join(str(listing.row.get(key) or "") for key in ("title", "item_pvs", "sku_pvs"))


def values_told(listing: Any) -> list[str]:
    """Values under the family's key, as the attribute parser finds them."""
    item = parse_item(listing.row, "here")
    found = [parse_attributes(text) for text in (item.item_attributes, item.sku_attributes)]
    return [value for attributes in found for value in attributes.get(listing.product.family.key, [])]


def writings(product: Any, value: str) -> set[str]:
    return {normalise(form) for form in words.writings(product.family, value)}


def parts_of(value: str) -> list[str]:
    return list(value) if value in words.MODELS else [value]


def test_bytes_do_not_depend_on_hash_seed_or_old_files(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["sample", "--raw", str(tmp_path), "--products", "24", "--seed", "5"])  # to be replaced, stale parts and all
    monkeypatch.setenv("PYTHONHASHSEED", "1234")
    run = run_verb("sample", "--raw", tmp_path, "--products", 24)
    assert snapshot(tmp_path) == snapshot(raw)
    assert run.stderr == ""  # no progress bar where nobody watches
    assert "./entrypoint.sh resize --raw" in run.stdout


def test_another_seed_gives_another_catalogue() -> None:
    rows = [sample.plan(24, seed).listings["train"][0].row for seed in (0, 1)]
    assert rows[0] != rows[1]


def test_raw_names_are_the_organisers(raw: Path) -> None:
    assert sorted(path.name for path in raw.iterdir() if path.name[0] != ".") == [
        "item_test_answers.jsonl", "item_test_images", "item_test_info.jsonl", "item_test_pair.jsonl",
        "item_train_images.zip.partaa", "item_train_images.zip.partab", "item_train_images.zip.partac",
        "item_train_info.jsonl", "item_train_pair.jsonl",
        "item_valid_images.zip", "item_valid_info.jsonl", "item_valid_pair.jsonl",
    ]  # fmt: skip


def test_pairs_name_known_items_and_splits_share_none(raw: Path) -> None:
    items = {split: read_items(raw / f"item_{split}_info.jsonl") for split in SPLITS}
    assert len({item_id for of_split in items.values() for item_id in of_split}) == sum(map(len, items.values()))
    for split in SPLITS:
        pairs = read_pairs(raw / f"item_{split}_pair.jsonl", items[split], "optional")
        assert all((pair.label is None) == (split == "test") for pair in pairs)
        assert len({frozenset((pair.left, pair.right)) for pair in pairs}) == len(pairs)
        assert all(pair.left != pair.right for pair in pairs)
    answers = read_pairs(raw / "item_test_answers.jsonl", items["test"])
    asked = read_pairs(raw / "item_test_pair.jsonl", items["test"], "optional")
    assert [(pair.left, pair.right) for pair in answers] == [(pair.left, pair.right) for pair in asked]


def test_pictures_are_as_disorderly_as_promised(raw: Path) -> None:
    seen: Counter[str] = Counter()
    for split, defects in sample.DEFECTS.items():
        files, items = pictures(raw, split), read_items(raw / f"item_{split}_info.jsonl")
        named = {item.image_name for item in items.values()}
        assert len(named) == len(items)
        assert len(named - set(files)) == defects.count("missing")
        assert len(set(files) - named) == 1  # named by no item
        assert sum(not decodes(content) for content in files.values()) == len(set(defects) - {"missing"})
        twins = [stem for stem, count in Counter(Path(name).stem for name in files).items() if count > 1]
        assert len(twins) == (split == "train")
        seen.update(Path(name).suffix for name in files)
        for name, content in files.items():
            if decodes(content):
                picture = Image.open(io.BytesIO(content))
                assert 160 <= min(picture.size) <= max(picture.size) <= 360
                assert picture.format == {".png": "PNG", ".gif": "GIF", ".bmp": "BMP"}.get(Path(name).suffix, "JPEG")
    assert set(seen) == {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".SS2"}


def test_texts_are_as_disorderly_as_promised(raw: Path) -> None:
    rows = [row for split in SPLITS for row in map(orjson.loads, (raw / f"item_{split}_info.jsonl").open("rb"))]
    attributes = [row[key] for row in rows for key in ("item_pvs", "sku_pvs") if row.get(key)]
    titles = [row["title"] for row in rows if row.get("title")]
    assert any("#:#" in text and "#;#" in text for text in attributes)
    assert any("#:" in text and "#:#" not in text and ";" in text for text in attributes)
    assert any("#" not in text and text.count(":") > 1 for text in attributes)
    assert any(len(values) > 1 for text in attributes for values in parse_attributes(text).values())
    for mark in ("如图;见详情", "款式：见图；现货", "比例1:1"):
        assert any(mark in text for text in attributes)
    fields = ("title", "item_pvs", "sku_pvs", "industry_name", "cate_id", "cate_name", "cate_id_path", "cate_name_path")
    values = [row.get(key, "missing") for row in rows for key in fields]
    assert None in values
    assert "" in values
    assert "missing" in values
    assert any("【" in title for title in titles)
    assert any(emoji in title for title in titles for emoji in words.EMOJI)
    assert any(normalise(title) != " ".join(title.lower().split()) for title in titles)  # full width


def test_default_plan_is_large_enough_to_learn_from(default_plan: Any) -> None:
    listings = [listing for rows in default_plan.listings.values() for listing in rows]
    assert len(listings) >= 1200
    assert len({listing.product.number for listing in listings}) == PRODUCTS.default >= 300
    families = {split: {row.product.family.number for row in rows} for split, rows in default_plan.listings.items()}
    assert sum(map(len, families.values())) == len(set().union(*families.values()))
    told: Counter[str] = Counter()  # by value; a model number counts by its characters
    for listing in default_plan.listings["train"]:
        if listing.product.family.kind == "text":
            told.update(parts_of(listing.product.value))
    kinds = {words.CATEGORIES[category][4][1] for category in words.TEXT_MIX}
    wanted = {part for kind in kinds for value in words.VALUES[kind] for part in parts_of(value)}
    assert min(told[part] for part in wanted) >= 4
    for part in (2, 3):  # colours, patterns
        assert min(Counter(listing.product.look[part] for listing in default_plan.listings["train"]).values()) >= 30
    for split, pairs in default_plan.pairs.items():
        product_of = {row.item_id: row.product for row in default_plan.listings[split]}
        both = [(product_of[pair.left], product_of[pair.right], pair.label) for pair in pairs]
        assert all((left.number == right.number) == (label == 1) for left, right, label in both)
        different = [left.family is right.family for left, right, label in both if label == 0]
        assert 0.38 <= 1 - len(different) / len(pairs) <= 0.46
        assert 0.45 <= sum(different) / len(different) <= 0.55


def test_siblings_differ_in_one_thing_only(default_plan: Any) -> None:
    families: dict[int, dict[int, Any]] = {}
    for rows in default_plan.listings.values():
        for row in rows:
            families.setdefault(row.product.family.number, {})[row.product.number] = row.product
    for siblings in (list(members.values()) for members in families.values()):
        values, looks = {product.value for product in siblings}, {product.look for product in siblings}
        family = siblings[0].family
        assert (len(values), len(looks)) == ((len(siblings), 1) if family.kind == "text" else (1, len(siblings)))
        differing = [part for part in range(4) if len({look[part] for look in looks}) > 1]
        assert differing == [number for number, part in enumerate(LOOK) if part == family.differs]


def test_picture_families_say_nothing_of_the_picture(default_plan: Any) -> None:
    rows = [row for rows in default_plan.listings.values() for row in rows if row.product.family.kind == "picture"]
    telling = [word for word, _ in words.COLOURS] + list("红橙黄绿蓝青紫粉棕黑白灰彩条纹格波点拼")
    spoken = "\n".join(texts(row) for row in rows)
    assert not [word for word in telling if word in spoken]


def test_parser_recovers_the_values_that_tell_siblings_apart(default_plan: Any) -> None:
    rows = [row for rows in default_plan.listings.values() for row in rows]
    silent = 0
    for row in rows:
        told = values_told(row)
        assert set(told) <= writings(row.product, row.product.value)
        read = item_text(parse_item(row.row, "here"))  # all that the model sees
        silent += not any(form in read for form in writings(row.product, row.product.value))
    assert sum(bool(values_told(row)) for row in rows) / len(rows) >= 0.75
    assert silent / len(rows) < 0.04


def test_ids_and_picture_names_tell_nothing(default_plan: Any) -> None:
    for rows in default_plan.listings.values():
        neighbours = sum(
            left.product is right.product
            for key in ("item_id", "image_name")
            for left, right in zip(
                *(sorted(rows, key=lambda row: getattr(row, key))[start:] for start in (0, 1)), strict=False
            )
        )
        assert neighbours < len(rows) * 0.08


def test_bad_usage_is_the_users_to_mend_and_their_files_stay(tmp_path: Path) -> None:
    for arguments in (["--products", "3"], ["--seed", "-1"]):
        with pytest.raises(UserError):
            main(["sample", "--raw", str(tmp_path), *arguments])
    (tmp_path / "item_train_info.jsonl").write_text("the organiser's own\n")
    with pytest.raises(UserError, match="empty folder"):
        main(["sample", "--raw", str(tmp_path), "--products", "24"])
    assert (tmp_path / "item_train_info.jsonl").read_text() == "the organiser's own\n"
    with pytest.raises(UserError):
        sample.sample(tmp_path / "item_train_info.jsonl" / "below", 24, 0)
