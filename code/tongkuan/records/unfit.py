"""Files that are no records as they stand: what each is, and the command that makes records of it."""

import csv
import os
import shlex
from pathlib import Path

from tongkuan.base.errors import clip

# First bytes, what it is, and a filter that unpacks it; `{}` takes a path where a tool reads no pipe.
PACKED = (
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dc <"),
    (b"BZh", "bzip2", "bzip2 -dc <"),
    (b"\xfd7zXZ\x00", "xz", "xz -dc <"),
    (b"PK\x03\x04", "zip", "unzip -p"),
    (b"7z\xbc\xaf\x27\x1c", "7z", "7z e -so"),
    (b"Rar!\x1a\x07", "rar", "unrar p -inul"),
)
TABLES = {"xlsx": "read_excel", "xls": "read_excel", "parquet": "read_parquet"}
SUFFIXES = (".zst", ".bz2", ".xz", ".zip", ".7z", ".rar")
FROM_TABLE = (
    "import csv, json, sys; [print(json.dumps(row)) for row in "
    "csv.DictReader(open(sys.argv[1], encoding={encoding!r}, newline=''), delimiter={delimiter!r})]"
)
FROM_PANDAS = (
    "import pandas, sys; pandas.{reader}(sys.argv[1]{types}).to_json(sys.argv[2], orient='records', lines=True, "
    "force_ascii=False)"
)
FROM_PYTHON = (
    "import ast, json, sys; [print(json.dumps(ast.literal_eval(line))) for line in open(sys.argv[1], "
    "encoding={encoding!r}) if line.strip()]"
)
NUM_LINES = 5  # of a table that are looked at


def quoted(path: Path) -> str:
    """A path as a shell takes it, whatever it begins with."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def in_place(path: Path, tool: str, source: Path | None = None) -> str:
    """The command line that writes `path` by a tool that reads a file: itself, or `source`.

    What is packed by gzip is to be unpacked first: the tool would not read it.
    """
    if is_gzip(path):
        packed_path, path, tool = path, path.with_name(path.name.removesuffix(".gz")), "gzip -dc <"
        return f"{in_file(packed_path, path, tool)}  # then run the same verb again"
    return in_file(source or path, path, tool)


def is_gzip(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(2) == b"\x1f\x8b"
    except OSError:
        return False


def in_file(source: Path, path: Path, tool: str) -> str:
    """The command line that writes `path` by a tool that reads `source`, which may be the same."""
    if source != path:
        return f"{tool} {quoted(source)} > {quoted(path)}"
    new = path.with_name(f"{path.name}.new")
    return f"{tool} {quoted(path)} > {quoted(new)} && mv {quoted(new)} {quoted(path)}"


def packed(path: Path, head: bytes, source: Path | None = None) -> str:
    """What is wrong and what to do when a file begins as an archive or a binary table, else nothing."""
    kind = ""
    if head.startswith(b"PK\x03\x04") and (b"[Content_Types]" in head or b"xl/" in head):
        kind = "xlsx"
    elif head.startswith(b"\xd0\xcf\x11\xe0"):
        kind = "xls"
    elif head.startswith(b"PAR1"):
        kind = "parquet"
    if kind:
        types = ", dtype=str" if kind != "parquet" else ""
        code = FROM_PANDAS.format(reader=TABLES[kind], types=types)
        table = source or path.with_suffix(f".{kind}")
        move = "" if source else f"mv {quoted(path)} {quoted(table)} && "
        tool = f"python3 -c {shlex.quote(code)} {quoted(table)} {quoted(path)}"
        return f"a table ({kind}), not JSON lines; with pandas: {move}{tool}"
    for magic, name, tool in PACKED:
        if head.startswith(magic):
            return f"packed ({name}), not JSON lines; unpack it: {in_place(path, tool, source)}"
    return ""


def beside(path: Path) -> str:
    """What to do when `path` is not there and the same records lie beside it in another form, else nothing."""
    for suffix in SUFFIXES:
        source = path.with_name(path.name + suffix)
        if os.path.isfile(source):  # noqa: PTH113 - of any name
            with source.open("rb") as file:
                what = packed(path, file.read(4096), source)
            return f"{source.name} lies there: {what}" if what else ""
    for suffix in (".json", ".ndjson", ".txt", ".csv", ".tsv", ".xlsx"):
        source = path.with_suffix(suffix)
        if os.path.isfile(source):  # noqa: PTH113 - of any name
            return f"{source.name} lies there; give it this name: mv {quoted(source)} {quoted(path)}"
    return ""


def not_json(path: Path, head: str, encoding: str) -> str:
    """What is wrong and what to do when the text of a whole file is no JSON but something well known, else nothing.

    `head` is the beginning of its text, `encoding` what Python calls its encoding.
    """
    text = head.lstrip("\ufeff \t\r\n")
    if text.startswith("<"):
        return "a web page or XML, not JSON lines; fetch the file itself once more"
    if text.startswith("version https://git-lfs"):
        return "a Git LFS pointer, not the file; run git lfs pull where it comes from"
    if text.startswith(("{'", '{"')):
        if "'" not in text.split("\n", 1)[0] or not looks_like_python(text):
            return ""
        tool = f"python3 -c {shlex.quote(FROM_PYTHON.format(encoding=encoding))}"
        return f"objects as Python prints them, not JSON; rewrite them: {in_place(path, tool)}"
    if (delimiter := delimiter_of(text)) is not None:
        table = path.with_suffix(".csv")
        code = FROM_TABLE.format(encoding=encoding, delimiter=delimiter)
        tool = f"python3 -c {shlex.quote(code)}"
        name = {",": "CSV", "\t": "TSV"}.get(delimiter, f"with {clip(delimiter)} between its columns")
        move = "" if is_gzip(path) else f"mv {quoted(path)} {quoted(table)} && "
        return f"a table ({name}), not JSON lines: {move}{in_place(path, tool, table)}"
    return ""


def looks_like_python(text: str) -> bool:
    return text.startswith("{'") or ": '" in text.split("\n", 1)[0]


def delimiter_of(text: str) -> str | None:
    """What parts the columns of a table's first lines, None when they are no table."""
    if text[:1] in ("{", "[") or not text:
        return None
    lines = text.split("\n")[: NUM_LINES + 1]
    first = lines[0].strip().strip('"')
    for delimiter in (",", "\t", ";", "|"):
        try:
            fields = next(csv.reader([lines[0]], delimiter=delimiter), [])
        except csv.Error:  # such as a carriage return within a field
            return None
        names = [name.strip().strip('"').lower() for name in fields]
        if len(names) > 1 and ("item_id" in names or "src_item_id" in names):
            return delimiter
        widths = {line.count(delimiter) for line in lines[: max(1, len(lines) - 1)] if line.strip()}
        if len(lines) > 2 and len(widths) == 1 and min(widths) > 0 and first.isprintable():
            return delimiter
    return None
