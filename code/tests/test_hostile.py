"""Files from strangers through the real readers: handled or refused in one line; nothing runs, nothing hangs."""

import io
import json
import pickle
import stat
import warnings
import zipfile
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from commands import run_verb
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from release_worlds import Payload
from resize_worlds import hand_out, images, ledger, picture, run
from test_main import error_of, predict
from worlds import make_data, train_words

from data_scripts.archives import sources
from tongkuan.base.errors import UserError, clip, nearest
from tongkuan.cli.verbs import main
from tongkuan.model.encoders import build_text, read_tensors, text_config_of
from tongkuan.presets import load_settings
from tongkuan.records import pictures
from tongkuan.records.attributes import item_text
from tongkuan.records.items import parse_item, read_items, read_pairs
from tongkuan.records.result import read_predictions

ID = '{"item_id": "a", "title": '
DEEP = "[" * 1000 + "]" * 1000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def is_one_line(error: UserError) -> bool:
    return len(str(error).splitlines()) == 1 and len(str(error)) < 500


# ---------------------------------------------------------------------------------------------------------------------
# Lines


@pytest.mark.parametrize(
    "line",
    [
        *(DEEP, "[" * 100_000, '{"item_id": ' + DEEP + "}", ID + DEEP + "}", ID + '{"a":' * 900 + "1" + "}" * 901),
        *(ID + "1e999}", ID + '"\\ud800"}', ID + '"\\ud800", "n": NaN}', ID + '"\x00"}', ID + "[1.5]}", ID + "true}"),
        *(
            "\x00",
            '{"item_id": ""}',
            '{"item_id": null}',
            "{}",
            "[]",
            "null",
            '""',
            "\ufeff\ufeff{}",
            "[" + "1," * 999_999 + "1]",
        ),
        '{"item_id": "b", "item_id": ["' + "x" * 10_000_000 + '"]}',
    ],
)
def test_a_hostile_line_is_one_line(path: Path, line: str) -> None:
    path.write_text(line, encoding="utf-8")
    for read in (read_items, read_pairs, lambda place: list(read_predictions(place))):
        with pytest.raises(UserError, match=r"rows\.jsonl:1: ") as caught:
            read(path)
        assert is_one_line(caught.value)


def test_odd_lines_that_hold_an_item_are_taken(path: Path) -> None:
    rows = [
        '\ufeff{"item_id": "a", "title": "\\u0000\\u2028\\u001b[31m", "title": "last"}\r',
        '{"item_id": "b", "title": "' + "长" * 100_000 + '", "extra": ' + "[" * 900 + "]" * 900 + "}",
        json.dumps({"item_id": "c", "title": "x" * 10_000_000}),
        "\r",
        '{"item_id": "\\u0000\\n"}',
    ]
    path.write_text("\n".join(rows), encoding="utf-8")
    items = read_items(path)
    assert items["a"].title == "last"
    assert [len(item.title) for item in items.values()] == [4, 100_000, 10_000_000, 0]
    assert len(item_text(items["b"])) == 100_000


def test_a_line_without_an_end_is_not_read_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tongkuan.records.rows.MAX_LINE", 100)
    path.write_bytes(b'{"item_id":"a"}\n' + b" " * 1000)
    with pytest.raises(UserError, match=r"rows\.jsonl:2: longer than 0 MB"):
        read_items(path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="zero:1: longer than 64 MB"):
        read_items(Path("/dev/zero"))


def test_an_item_listed_twice_and_a_name_no_file_can_have_are_named(path: Path) -> None:
    path.write_text('{"item_id": "a"}\n{"item_id": "a", "title": "\\u0000"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: item 'a' stands here twice"):
        read_items(path)
    with pytest.raises(UserError, match="not readable"):
        read_items(path / ("x" * 5000))


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("../../up.jpg", "up.jpg"),
        ("/dev/zero", "dev/zero"),
        ("a/../b.jpg", "a/b.jpg"),
        ("sub//./c.jpg", "sub/c.jpg"),
        ("..", ""),
        ("a..b.jpg", "a..b.jpg"),
        ("长\\x.jpg", "长\\x.jpg"),
    ],
)
def test_a_pictures_name_stays_inside_its_folder(name: str, inside: str) -> None:
    assert parse_item({"item_id": "a", "item_image_name": name}, "here").image_name == inside


def test_a_near_name_is_looked_for_within_bounds() -> None:
    letters = [format(number * 0x9E3779B97F4A7C15 % (1 << 100), "0100b") for number in range(20_000)]
    assert nearest(letters[7][:-1], letters[:100]).startswith(" (did you mean")
    nearest("01" * 50, letters)  # took 150 s
    assert nearest("x" * 101, letters) == ""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
KEYS = "item_id title item_pvs item_image_name src_item_id tgt_item_id item_label threshold src_item_emb tgt_item_emb"
ROWS = st.dictionaries(st.sampled_from(KEYS.split()), JSON | st.sampled_from(["a", "[1]", "0", 0.5])).map(json.dumps)


@given(st.lists(ROWS | st.text(max_size=20), max_size=3), st.sampled_from(["\n", "\r\n", "\x00", "\n\n"]))
def test_any_file_is_records_or_one_line(tmp_path_factory: pytest.TempPathFactory, lines: list[str], end: str) -> None:
    path = tmp_path_factory.getbasetemp() / "wild.jsonl"
    path.write_bytes(end.join(lines).encode("utf-8", "surrogatepass"))
    for read in (read_items, read_pairs, lambda place: list(read_predictions(place))):
        try:
            read(path)
        except UserError as error:
            assert is_one_line(error) and str(error).startswith(str(path))


@given(JSON)
def test_any_value_is_clipped_to_one_line(value: Any) -> None:
    assert len(clip(value)) <= 60 and len(clip(value).splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Archives and pictures


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "data"


def write_zip(raw: Path, entries: list[tuple[zipfile.ZipInfo | str, bytes]]) -> None:
    path = raw / "item_train_images.zip"
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:  # the warnings are of duplicate names
            archive.writestr(name, content)


def test_a_zip_with_links_bombs_and_duplicate_names(raw: Path, out: Path, tmp_path: Path) -> None:
    names = ["link.jpg", "bomb.jpg", "../up.jpg", "/abs.jpg", "a.jpg"]
    hand_out(raw, "train", {}, names)
    link = zipfile.ZipInfo("link.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(picture("blue"))
    entries = [(link, str(secret).encode()), ("bomb.jpg", bytes(sources.MAX_BYTES + 1))]
    entries += [(name, picture("red")) for name in ("../up.jpg", "/abs.jpg", "a.jpg", "../../a.jpg")]
    entries += [("a.jpg", picture("blue"))]
    write_zip(raw, entries)
    assert (raw / "item_train_images.zip").stat().st_size < 200_000, "it unpacks to hundreds of times its size"
    assert run(raw, out) == 0
    rows = ledger(out)
    assert rows["train", "link.jpg"]["status"] == rows["train", "bomb.jpg"]["status"] == "unreadable"
    assert list(images(out, "train").values()) == ["", "", "up.jpg", "abs.jpg", ""], "which a.jpg, nobody can tell"
    assert sorted(file.name for file in (out / "images").iterdir()) == ["a.jpg", "abs.jpg", "a~2.jpg", "up.jpg"]
    assert {file.name for file in tmp_path.iterdir()} == {"raw", "data", "secret.jpg"}


@given(st.integers(0, 2**31), st.integers(1, 255), st.booleans())
def test_any_damage_to_a_zip_is_one_line(
    tmp_path_factory: pytest.TempPathFactory, place: int, change: int, cut: bool
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("a.jpg"), b"a" * 40)
        archive.writestr(zipfile.ZipInfo("b.jpg"), b"b" * 40, zipfile.ZIP_DEFLATED)
    content = bytearray(buffer.getvalue())
    content[place % len(content)] ^= change
    path = tmp_path_factory.getbasetemp() / "item_train_images.zip"
    path.write_bytes(content[: place % len(content)] if cut else content)
    try:
        archive = sources.find_source(path.parent, "train")
    except UserError as error:
        assert is_one_line(error)
        return
    for _, key in archive.entries():
        try:
            assert len(archive.read(key)) <= 40
        except pictures.UnreadableError as error:
            assert str(error)


ODD = [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "I;16"), ("PNG", "P"), ("PNG", "LA"), ("GIF", "P"), ("TIFF", "F")]


@pytest.mark.parametrize(("kind", "mode"), ODD)
@pytest.mark.parametrize("size", [(1, 1), (30_000, 10), (10, 30_000)])
def test_odd_sizes_and_modes_become_square_pictures(kind: str, mode: str, size: tuple[int, int]) -> None:
    how = {"transparency": 0} if mode == "P" else {}
    made, status, detail, width, height = pictures.squash(
        picture(0 if mode in ("P", "I;16", "F") else None, kind, size, mode, **how), 32
    )
    with Image.open(io.BytesIO(made)) as image:
        assert (image.size, image.mode, status, detail) == ((32, 32), "RGB", "ok", "")
    assert (width, height) == size


@given(
    st.sampled_from(ODD),
    st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=6),
    st.integers(0, 99),
)
def test_any_damaged_picture_is_a_reason_or_a_square(
    odd: tuple[str, str], changes: list[tuple[int, int]], cut: int
) -> None:
    content = bytearray(picture(0 if odd[1] in ("P", "I;16", "F") else None, odd[0], (20, 20), odd[1]))
    for place, value in changes:
        content[place % len(content)] = value
    try:
        made, *_ = pictures.squash(bytes(content[: len(content) - cut]), 8)
    except pictures.UnreadableError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert Image.open(io.BytesIO(made)).size == (8, 8)


# ---------------------------------------------------------------------------------------------------------------------
# Whole verbs


HOSTILE_ROWS = [
    ID + DEEP + "}",
    ID + '"\ud800"}',
    ID + "true}",
    "[" * 100_000,
    "\x00",
]


@pytest.mark.parametrize("number", range(len(HOSTILE_ROWS)))
def test_verbs_refuse_a_hostile_line(tmp_path: Path, model: Path, number: int) -> None:
    data = make_data(tmp_path / "data", num_products=2)
    for split in ("train", "test"):
        with (data / f"item_{split}_info.jsonl").open("ab") as file:
            file.write(HOSTILE_ROWS[number].encode("utf-8", "surrogatepass") + b"\n")
    for words in (predict(data, model, tmp_path / "submit"), ("attributes", "--data", data)):
        assert "info.jsonl:7: " in error_of(*words)
    assert "item_train_info.jsonl:7: " in error_of(*train_words(tmp_path, data))
    assert not (tmp_path / "submit" / "result.jsonl").exists() and not (tmp_path / "m").exists()


@pytest.mark.slow
def test_a_verb_ends_with_2_and_one_line(tmp_path: Path, model: Path) -> None:
    data = make_data(tmp_path / "data", num_products=2)
    (data / "item_test_info.jsonl").write_text(DEEP)
    bomb = tmp_path / "bomb.yaml"
    bomb.write_text("a: &a [x]\nb: [*a]\n")
    for words in (predict(data, model, tmp_path / "submit"), ("train", "--preset", bomb, "--data", data)):
        done = run_verb(*words, timeout=60)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr


def test_predict_takes_any_titles_and_picture_names(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(tmp_path / "data", num_products=2)
    path = data / "item_test_info.jsonl"
    rows = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    odd = [{"title": "长" * 100_000}, {"title": "\x00\u2028"}, {"item_image_name": "/dev/zero"}]
    odd += [{"item_image_name": "\x00"}, {"item_pvs": "#;#" * 100_000}, {"title": "", "item_pvs": ""}]
    path.write_bytes(b"".join(orjson.dumps(row | change) + b"\n" for row, change in zip(rows, odd, strict=True)))
    main([*map(str, predict(data, model, tmp_path / "submit")), "--cache", str(tmp_path / "cache")])
    assert "2 pictures are missing or unreadable" in capsys.readouterr().out
    assert len(list(read_predictions(tmp_path / "submit" / "result.jsonl"))) == 8


# ---------------------------------------------------------------------------------------------------------------------
# Pickles


def test_a_payload_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", num_products=2)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    payload = Payload(tmp_path / "ran")
    torch.save({"settings": {}, "model": payload}, run_dir / "last.pt")
    assert "last.pt: " in error_of(*train_words(tmp_path, data))
    assert not (tmp_path / "ran").exists() and not (tmp_path / "m").exists()
    pickle.loads(pickle.dumps(payload))
    assert (tmp_path / "ran").exists(), "it would have run"


@pytest.mark.parametrize("content", ["torch", "pickle", "empty", "page", "list"])
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
def test_hostile_weights_of_an_image_encoder_are_refused_unrun(tmp_path: Path, content: str, suffix: str) -> None:
    path, payload = tmp_path / f"encoder{suffix}", Payload(tmp_path / "ran")
    contents = {"pickle": pickle.dumps(payload), "empty": b"", "page": b"<html>404</html>"}
    if content in contents:
        path.write_bytes(contents[content])
    else:
        torch.save({"x": payload} if content == "torch" else [1], path)
    with pytest.raises(UserError, match=r"encoder\.\w+: damaged, or holds more than tensors") as caught:
        read_tensors(tmp_path)
    assert is_one_line(caught.value) and not (tmp_path / "ran").exists()


BERT = {
    "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    "vocab_size": 9,
}  # fmt: skip


def test_a_text_encoders_folder_runs_nothing_and_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("it asks whether to run the folder's code")

    monkeypatch.setattr("builtins.input", ask)
    folder, ran = tmp_path / "encoder", tmp_path / "ran"
    folder.mkdir()
    overrides = [f"model.text.weights=folder:{folder}", "model.text.config={}"]
    settings = load_settings("demo", overrides).model.text
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w')\n", encoding="utf-8")
    configs = [{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, BERT | {"hidden_size": "x"}, [1], {}]
    for config in configs:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(UserError) as caught:
            text_config_of(settings, 9)
        assert len(str(caught.value).splitlines()) == 1
    (folder / "config.json").write_text(json.dumps(BERT), encoding="utf-8")
    torch.save({"x": Payload(ran)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        build_text(settings, text_config_of(settings, 9), pretrained=True)
    assert len(str(caught.value).splitlines()) == 1
    assert not ran.exists()
