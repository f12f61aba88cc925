"""Whole files as people have them: read for what they are, or one line with the command that mends them."""

import bz2
import gzip
import json
import lzma
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tongkuan.base.errors import UserError
from tongkuan.records import rows
from tongkuan.records.items import Item, read_items, read_pairs
from tongkuan.records.result import read_predictions
from tongkuan.records.rows import is_given, read_rows

ROWS = [
    {"item_id": "a", "title": "纯棉T恤 短袖", "item_pvs": "品牌#:#甲"},
    {"item_id": "b", "title": 'a "quoted" {text} [1], \\ and , more', "item_pvs": None},
    {"item_id": "c", "title": "羽绒服女", "n": {"x": [1, {"y": "}"}]}},
]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
PRETTY = [json.dumps(row, ensure_ascii=False, indent=2) for row in ROWS]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "my $data's"  # a shell must not read it otherwise
    folder.mkdir()
    return folder / "item_train_info.jsonl"


@pytest.fixture(autouse=True)
def forget() -> None:
    rows.noted.clear()


def read(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(path, "do this")]


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_items(path)
    text = str(caught.value)
    assert text.count("\n") == 0 and text.startswith(str(path))
    return text


def follow(path: Path, mark: str) -> None:
    """Run the command that an error ends in."""
    command = error_of(path).split(mark, 1)[1]
    subprocess.run(["bash", "-c", command], check=True, timeout=60)


@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "gb18030", "gbk", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"]
)
def test_encodings_are_recognised_and_noted_once(path: Path, encoding: str, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_bytes(TEXT.encode(encoding))
    assert read(path) == read(path) == ROWS
    notes = capsys.readouterr().err
    assert notes.count("note: ") == (encoding != "utf-8-sig")
    assert encoding == "utf-8-sig" or f"{path}: read as {encoding[:6].upper().replace('GBK', 'GB18030')}" in notes


@pytest.mark.parametrize("text", ["😀好", "\u3400丂好的", "繁體中文的標題：顏色分類"])
def test_gb18030_holds_rare_characters_too(path: Path, text: str) -> None:
    path.write_bytes(json.dumps({"item_id": "a", "title": text}, ensure_ascii=False).encode("gb18030"))
    assert read_items(path) == {"a": Item("a", text)}


def test_an_encoding_that_begins_late_is_reported(path: Path) -> None:
    start = [{"item_id": f"n{number}", "title": "x" * 100} for number in range(20_000)]
    ascii_part = "".join(json.dumps(row) + "\n" for row in start)
    path.write_bytes((ascii_part + TEXT).encode("gb18030"))
    assert read(path) == start + ROWS


@pytest.mark.parametrize(
    ("encoding", "name", "titles"),
    [
        ("big5", "BIG5", ["蘋果手機殼 純棉短袖", "女裝 顏色分類 紅色"]),
        ("cp932", "SHIFT_JIS", ["綿Tシャツ 赤 サイズ", "おしゃれなレディース靴"]),
        ("euc_kr", "EUC-KR", ["정품 휴대폰 케이스 면 티셔츠 빨강", "사이즈 무료배송 주방용품 여성 신발"]),
        ("cp1252", "WINDOWS-1252", ["crème brûlée à côté", "Größe Öl für Mädchen"]),
        ("cp1251", "WINDOWS-1251", ["Футболка хлопковая красная", "размер бренд"]),
    ],
)
def test_another_encoding_is_named_with_what_mends_it(path: Path, encoding: str, name: str, titles: list[str]) -> None:
    lines = [{"item_id": str(number), "title": title} for number, title in enumerate(titles)]
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines).encode(encoding))
    assert f"looks like {name}: iconv" in error_of(path) and "delete" not in error_of(path)
    follow(path, f"looks like {name}: ")
    assert read(path) == lines


def test_lines_of_two_encodings_are_made_one(path: Path) -> None:
    path.write_bytes(TEXT.encode() + TEXT.encode("gb18030").replace(b'"a"', b'"d"') + TEXT.encode("gb18030"))
    assert "4 lines are GB18030 and 2 UTF-8" in error_of(path)
    follow(path, "make them all UTF-8: ")
    assert [row["title"] for row in read(path)] == [row["title"] for row in ROWS] * 3


@pytest.mark.parametrize(
    "damage", [b'{"item_id":"\xff"}', b'{"item_id":"x","title":"\xe7\xba"}', b'{"item_id":"\xd6"}']
)
def test_one_bad_line_of_a_good_file_is_named(path: Path, damage: bytes) -> None:
    path.write_bytes(TEXT.encode() + damage + b"\n" + TEXT.encode())
    assert error_of(path).startswith(f"{path}:4: not a JSON line")


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_text_cut_off_within_a_character_is_said(path: Path, cut: int) -> None:
    data = TEXT.encode("utf-16")
    path.write_bytes(data[: len(data) - 8 - cut])
    assert str(path) in error_of(path)


LAYOUTS: dict[str, Callable[[], str]] = {
    "array": lambda: json.dumps(ROWS),
    "array of lines": lambda: "[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]\n",
    "array with a trailing comma": lambda: "[" + "".join(json.dumps(row) + ",\n" for row in ROWS) + "]",
    "indented array": lambda: json.dumps(ROWS, indent=4),
    "array after blank lines": lambda: "\ufeff\n\n " + json.dumps(ROWS),
    "pages": lambda: json.dumps(ROWS[:1]) + "\n" + json.dumps(ROWS[1:]),
    "pretty": lambda: "\n".join(PRETTY),
    "pretty with commas": lambda: ",\n".join(PRETTY) + ",\n",
    "lines with commas": lambda: "".join(json.dumps(row) + ",\n" for row in ROWS),
    "all on a line": lambda: "".join(map(json.dumps, ROWS)),
    "old line ends": lambda: "\r".join(map(json.dumps, ROWS)),
    "wrapped": lambda: json.dumps({"code": 0, "items": ROWS}),
    "wrapped twice, indented": lambda: json.dumps({"ok": True, "data": {"total": 3, "list": ROWS}}, indent=1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_objects_stand_as_they_like(path: Path, layout: str, encoding: str, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_bytes(LAYOUTS[layout]().encode(encoding))
    assert read(path) == ROWS
    assert capsys.readouterr().err.count("note: ") == 1


def test_lines_of_records_are_those_of_the_file(path: Path) -> None:
    path.write_text(json.dumps({"data": {"list": ROWS}}, indent=1))
    numbers = [number for number, _ in read_rows(path, "")]
    lines = path.read_text().splitlines()
    assert ['"item_id"' in lines[number] for number in numbers] == [True] * 3
    path.write_text("\n\n" + "\n".join(PRETTY))
    assert [number for number, _ in read_rows(path, "")] == [3, 8, 13]


def test_a_record_with_lists_of_objects_is_no_wrapper(path: Path) -> None:
    row = {"item_id": "a", "item_pvs": [{"name": "品牌", "value": "甲"}]}
    path.write_text(json.dumps(row))
    assert read(path) == [row]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[{"item_id": "a"},\n{"item_id": "b"}\n', 1),
        ('[{"item_id": "a"},\n{"item_id": "b"\n', 2),
        ('[{"item_id": "a"}\n]\nmore', 3),
        ('[{"item_id": "a"},\n{"item_id": b}]', 2),
        ('{\n"item_id": "a"\n}\n{\n"item_id": }', 4),
        ('[{"item_id": "a"}, [{"item_id": "b"}]]', 1),
    ],
)
def test_a_broken_list_names_its_line(path: Path, text: str, line: int) -> None:
    path.write_text(text)
    assert error_of(path).startswith(f"{path}:{line}: ")


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_no_numbers_are_null(path: Path, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(f'{{"item_id": "a", "title": "NaN, {word}", "item_pvs": {word}}}\n{{"item_id": "b"}}\n')
    assert read_items(path) == {"a": Item("a", f"NaN, {word}"), "b": Item("b")}
    assert "NaN taken for null" in capsys.readouterr().err


@pytest.mark.parametrize("layers", [1, 2])
def test_gzip_is_read_under_either_name(path: Path, layers: int, capsys: pytest.CaptureFixture[str]) -> None:
    data = TEXT.encode("gb18030")
    for _ in range(layers):
        data = gzip.compress(data)
    path.write_bytes(data)
    assert read(path) == ROWS
    packed = path.rename(path.with_name(f"{path.name}.gz"))
    assert is_given(path) and read(path) == ROWS
    assert f"{packed}: read as gzip, GB18030" in capsys.readouterr().err
    path.write_text('{"item_id": "z"}')
    assert read(path) == [{"item_id": "z"}]
    assert "and not item_train_info.jsonl.gz beside it" in capsys.readouterr().err


def test_gzip_that_breaks_off_and_gzip_that_never_ends_are_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = gzip.compress(TEXT.encode() * 1000)
    path.write_bytes(data[: len(data) // 2])
    assert "damaged or breaks off" in error_of(path)
    path.write_bytes(gzip.compress(bytes(1 << 24)))
    monkeypatch.setattr(rows, "MAX_LINE", 1 << 20)
    assert "longer than 1 MB" in error_of(path)
    path.write_bytes(gzip.compress(b"[{" + b" " * (1 << 24)))
    assert "an object longer than 1 MB" in error_of(path)


def zipped(data: bytes, path: Path) -> bytes:
    with zipfile.ZipFile(path.with_name("x.zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("items.jsonl", data)
    return path.with_name("x.zip").read_bytes()


@pytest.mark.parametrize("kind", ["bzip2", "xz", "zip", "zstd"])
def test_packed_files_name_their_command(path: Path, kind: str) -> None:
    program = {"zip": "unzip"}.get(kind, kind)
    if shutil.which(program) is None:  # then the words alone can be tried
        start = {"bzip2": b"BZh9", "xz": b"\xfd7zXZ\0", "zip": b"PK\3\4", "zstd": b"\x28\xb5\x2f\xfd"}[kind]
        path.write_bytes(start + bytes(100))
        assert f"packed ({kind}), not JSON lines; unpack it: {program} -" in error_of(path)
        return
    data = TEXT.encode()
    if kind == "zstd":
        content = subprocess.run(["zstd", "-c"], input=data, capture_output=True, check=True).stdout
    else:
        content = {"bzip2": bz2.compress, "xz": lzma.compress, "zip": lambda d: zipped(d, path)}[kind](data)
    path.write_bytes(content)
    follow(path, "unpack it: ")
    assert read(path) == ROWS
    path.unlink()
    ending = {"bzip2": "bz2", "zstd": "zst"}.get(kind, kind)
    path.with_name(f"{path.name}.{ending}").write_bytes(content)
    assert "missing" in error_of(path)
    follow(path, "unpack it: ")
    assert read(path) == ROWS


@pytest.mark.parametrize(
    ("delimiter", "encoding"), [(",", "utf-8"), ("\t", "utf-16"), (",", "gb18030"), (";", "utf-8-sig"), ("|", "utf-8")]
)
def test_a_table_names_the_command_that_makes_lines_of_it(path: Path, delimiter: str, encoding: str) -> None:
    table = [["item_id", "title", "item_pvs"], ["1001", "纯棉的T恤", "品牌#:#甲"], ["1002", '"a, b"', ""]]
    lines = [delimiter.join('"' + cell.replace('"', '""') + '"' for cell in line) for line in table]
    path.write_bytes("\r\n".join(lines).encode(encoding))
    assert "a table" in error_of(path)
    follow(path, "not JSON lines: ")
    assert list(read_items(path)) == ["1001", "1002"]
    assert read_items(path)["1001"].title == "纯棉的T恤" and read_items(path)["1002"].title == '"a, b"'


@pytest.mark.parametrize("quote", ["'a'", "'it\\'s'", "'甲'"])
def test_objects_as_python_prints_them(path: Path, quote: str) -> None:
    path.write_text(f"{{'item_id': {quote}, 'title': None}}\n{{'item_id': 'b', 'ok': True}}\n", encoding="utf-8")
    follow(path, "rewrite them: ")
    assert len(read_items(path)) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><html><body>Please log in</body></html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PAR1\x15\x04", "read_parquet"),
        (b"PK\x03\x04\x14\0\x06\0[Content_Types].xml", "read_excel"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "read_excel"),
        (b"7z\xbc\xaf\x27\x1c\0\4", "7z e -so"),
    ],
)
def test_what_is_no_record_at_all_is_called_by_its_name(path: Path, content: bytes, said: str) -> None:
    path.write_bytes(content)
    assert said in error_of(path) and "mend or delete" not in error_of(path)


@pytest.mark.parametrize("ending", [".json", ".ndjson", ".txt"])
def test_records_under_another_name_are_pointed_to(path: Path, ending: str) -> None:
    path.with_suffix(ending).write_text(json.dumps(ROWS))
    follow(path, "give it this name: ")
    assert read(path) == ROWS


def test_a_result_is_read_as_the_judges_read_it(path: Path) -> None:
    row = {"src_item_id": "a", "src_item_emb": "[1]", "tgt_item_id": "b", "tgt_item_emb": "[1]", "threshold": 0}
    text = json.dumps(row)
    for content in (f"[{text}]", text + ",", text + text, json.dumps(row, indent=1), text.replace(": 0", ": NaN")):
        for data in (content.encode(), gzip.compress(text.encode()), text.encode("utf-16")):
            path.write_bytes(data)
            with pytest.raises(UserError, match=r"expected a JSON object|not a JSON line"):
                list(read_predictions(path))


WILD = st.dictionaries(
    st.text(max_size=3) | st.sampled_from(["item_id", "title", "item_pvs", "src_item_id", "tgt_item_id"]),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


@given(
    st.lists(WILD, max_size=3),
    st.sampled_from([None, 1]),
    st.sampled_from(["\n", ",\n", "", "]["]),
    st.sampled_from(["utf-8", "utf-16", "gb18030", "big5"]),
    st.integers(0, 3),
)
def test_any_file_is_rows_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None, end: str, encoding: str, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    data = end.join(json.dumps(value, ensure_ascii=False, indent=indent) for value in values)
    path.write_bytes(data.encode(encoding, "replace")[cut:])
    for reader in (read_items, read_pairs):
        try:
            reader(path)
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and re.match(re.escape(str(path)), str(error))


@pytest.mark.parametrize("text", ["a\rb,c\n", '"a\rb', "item_id\ttitle\r1\tx\r", "a,b\r\n1\r,2\r\n"])
def test_line_ends_of_old_machines_are_one_line_too(tmp_path: Path, text: str) -> None:
    (tmp_path / "any.jsonl").write_bytes(text.encode())
    with pytest.raises(UserError) as caught:
        read_items(tmp_path / "any.jsonl")
    assert len(str(caught.value).splitlines()) == 1


OBJECTS = st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=5), min_size=1), min_size=1, max_size=4)


@given(OBJECTS, st.sampled_from([None, 2]), st.sampled_from(["list", "lines", "joined", "commas"]))
def test_objects_come_back_from_every_layout(
    tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, str]], indent: int | None, layout: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "layout.jsonl"
    texts = [json.dumps(value, ensure_ascii=False, indent=indent) for value in values]
    joined = {"list": f"[{','.join(texts)}]", "lines": "\n".join(texts), "joined": "".join(texts)}
    path.write_text(joined.get(layout, ",\n".join(texts) + ","), encoding="utf-8", newline="")
    assert read(path) == values


@pytest.mark.parametrize(
    ("data", "mark"),
    [
        ("item_id,title\r\n1,纯棉\r\n".encode(), "not JSON lines: "),
        ('{"item_id": "1", "title": "蘋果手機殼 純棉"}\n'.encode("big5"), "BIG5: "),
        (b"{'item_id': 1}\n", "rewrite them: "),
    ],
)
def test_what_is_unfit_within_gzip_is_unpacked_first(path: Path, data: bytes, mark: str) -> None:
    path.write_bytes(gzip.compress(data))
    follow(path, mark)
    assert path.read_bytes() == data
    follow(path, mark)
    assert list(read_items(path)) == ["1"]
