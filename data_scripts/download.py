"""Fetch the organiser's files, or take them from a folder. `./entrypoint.sh download --help` has the list's form."""

import difflib
import itertools
import re
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import orjson
from tqdm import tqdm

from data_scripts.transfer import AGAIN, Partial, Patience, Wanted, copy, fetch, find_damage, is_archive
from tongkuan.base.errors import UserError, entrypoint
from tongkuan.base.files import READ_BLOCK, check_apart, publish, rename, sha256_of, sole_process

NAMES = [f"item_{s}_{kind}" for s in ("train", "valid", "test") for kind in ("info.jsonl", "pair.jsonl", "images.zip")]
NAME = re.compile(r"item_(train|valid|test)_(info\.jsonl|pair\.jsonl|images\.zip(\.part[a-z]{2})?)")
LETTERS = ["".join(pair) for pair in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=2)]
NEARBY = [*NAMES, *(f"{name}.part{suffix}" for name in NAMES if name.endswith(".zip") for suffix in LETTERS[:4])]
OPTIONS = {"size": re.compile(r"[0-9]{1,15}"), "sha256": re.compile(r"[0-9a-fA-F]{64}")}


def read_list(path: Path, have: Collection[str] = ()) -> list[Wanted]:
    """The files of a URL list; parts in `have` need not be on it. Raises UserError with a line a problem."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no readable text file; write one with a line `NAME URL` a file") from error
    wanted: dict[str, Wanted] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        if words := list(itertools.takewhile(lambda word: not word.startswith("#"), line.split())):
            try:
                entry = parse_line(words, f"{path}:{number}")
                if wanted.setdefault(entry.name, entry) is not entry:
                    raise ValueError(f"{entry.name} is on {wanted[entry.name].where} already; keep one of the two")
            except (ValueError, httpx2.InvalidURL) as error:
                problems.append(f"{path}:{number}: {error}")
    return checked(list(wanted.values()), have, problems, f"{path}: no links; write a line `NAME URL` a file")


def parse_line(words: list[str], where: str) -> Wanted:
    """A line's words as a file. Raises ValueError or InvalidURL; never quotes a link, for it may be a secret."""
    name, rest = ("", words) if "://" in words[0] else (words[0], words[1:])
    if not rest or "://" not in rest[0]:
        raise ValueError("no URL; write NAME URL [size=BYTES] [sha256=HEX]")
    url = httpx2.URL(rest[0])
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"cannot fetch from {url.scheme}://{url.host}; give an http or https link")
    name = name or url.path.rpartition("/")[2]
    if not NAME.fullmatch(name):
        near = difflib.get_close_matches(re.split(r"[/\\]", name)[-1], NEARBY, n=1)
        advice = f"did you mean {near[0]}?" if near else f"the names are {', '.join(NAMES)} and .partaa…"
        kind = "a path is no name:" if re.search(r"[/\\]", name) else "unknown name"
        raise ValueError(f"{kind} {name[:80]!r}; {advice}")
    options: dict[str, str] = {}
    for word in rest[1:]:
        key, _, value = word.partition("=")
        if key not in OPTIONS or key in options or not OPTIONS[key].fullmatch(value):
            raise ValueError(f"cannot use {word[:80]!r}; after the link come size=BYTES and sha256=64 hex digits, once")
        options[key] = value.lower()
    return Wanted(name, url, where, int(options["size"]) if "size" in options else None, options.get("sha256", ""))


def find_files(folder: Path, have: Collection[str] = ()) -> list[Wanted]:
    """The organiser's files in a folder. Raises UserError for names that only resemble theirs."""
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()} if folder.is_dir() else {}
    wanted, problems = [], []
    for name, path in files.items():
        if NAME.fullmatch(name):
            status = path.stat()
            wanted.append(Wanted(name, path, str(path), status.st_size, changed=status.st_mtime_ns))
        elif name[0] != "." and (
            near := difflib.get_close_matches(name, [n for n in NEARBY if n not in files], n=1, cutoff=0.85)
        ):
            problems.append(f"{path}: unknown name; rename it to {near[0]} or move it away")
    return checked(
        wanted, have, problems, f"{folder}: no file here is named {', '.join(NAMES)} or .partaa…; name another"
    )


def checked(wanted: list[Wanted], have: Collection[str], problems: list[str], nothing: str) -> list[Wanted]:
    """`wanted`, unless there are problems: those given, an archive that comes twice, or a gap in its parts."""
    places = {entry.name: entry.where for entry in wanted}
    for archive in sorted({archive_of(name) for name in places} - {""}):
        if archive in places:
            problems.append(f"{places[archive]}: {archive} comes whole and in parts; keep one of the two")
        parts = sorted(name for name in {*places, *have} if archive_of(name) == archive)
        gap = next(((p, s) for p, s in zip(parts, LETTERS, strict=False) if not p.endswith(s)), None)
        if gap:
            where = next(places[name] for name in parts[::-1] if name in places)
            problems.append(f"{where}: {archive}.part{gap[1]} is missing before {gap[0]}; add it")
    if problems or not wanted:
        raise UserError(*(problems or [nothing]))
    return wanted


def archive_of(name: str) -> str:
    """The archive that a part belongs to, else ""."""
    archive, dot, _ = name.partition(".part")
    return archive if dot else ""


class Record:
    """Which files are known to be whole: size, time and sha256 of each, for a joined archive also its parts' sha256."""

    def __init__(self, raw_dir: Path) -> None:
        self.raw_dir, self.path = raw_dir, raw_dir / ".download.json"
        self.files: dict[str, dict[str, Any]] = {}
        with suppress(OSError, ValueError, TypeError):  # nothing, or nothing readable, is known
            self.files = dict(orjson.loads(self.path.read_bytes()))

    def publish(self, temporary: Path, name: str, sha256: str, **more: Any) -> None:
        """Rename a whole file to its final name. Noted first: killed in between, the next call finds `temporary`.

        Raises UserError when a file stands there that is neither of this record nor the beginning of the new one.
        """
        target = self.raw_dir / name
        replaced = {}
        if target.exists():
            if not self.is_ours(name) and not begins_with(temporary, target):
                raise UserError(f"{target}: not brought by download, or changed since; move it away and {AGAIN}")
            replaced = {"replaces": stamp(target)}
        self.note(temporary, name, sha256, **more, **replaced)
        rename(temporary, target)

    def note(self, path: Path, name: str, sha256: str, **more: Any) -> None:
        """Remember that `path` is whole."""
        status = path.stat()
        self.files[name] = {"size": status.st_size, "time_ns": status.st_mtime_ns, "sha256": sha256, **more}
        with publish(self.path) as file:
            file.write(orjson.dumps(self.files, option=orjson.OPT_INDENT_2))

    def is_ours(self, name: str) -> bool:
        """Whether the file there is one that was brought: the noted one, or the one that it was to replace."""
        entry = self.files.get(name, {})
        known = ([entry.get("size"), entry.get("time_ns")], entry.get("replaces"))
        return stamp(self.raw_dir / name) in known

    def is_there(self, name: str) -> bool:
        """Whether the file itself is there, unchanged since it was whole."""
        try:
            status, entry = (self.raw_dir / name).stat(), self.files[name]
        except (FileNotFoundError, KeyError):
            return False
        return (status.st_size, status.st_mtime_ns) == (entry["size"], entry["time_ns"])

    def is_joined(self, part: str) -> bool:
        """Whether its archive is there, joined from the parts that are known now."""
        archive = archive_of(part)
        parts = self.files.get(archive, {}).get("parts", {})
        return part in parts and self.is_there(archive) and all(self.files[p]["sha256"] == parts[p] for p in parts)

    def whole(self) -> list[str]:
        """Names of what is there, by itself or within a joined archive."""
        return [name for name in self.files if self.is_there(name) or self.is_joined(name)]

    def has(self, wanted: Wanted) -> bool:
        """Whether that very file is there."""
        if wanted.name not in self.whole():
            # A file that somebody else put there: only what the list says of it can vouch for it.
            path = self.raw_dir / wanted.name
            is_vouched = wanted.sha256 or wanted.size is not None
            if wanted.changed or not is_vouched or not path.is_file():
                return False
            sha256 = sha256_of(path)
            if find_damage(path, sha256, wanted):
                return False
            self.note(path, wanted.name, sha256)
        entry = self.files[wanted.name]
        return (
            wanted.size in (None, entry["size"])
            and wanted.sha256 in ("", entry["sha256"])
            and wanted.changed in (0, entry.get("changed"))
        )


def stamp(path: Path) -> list[int]:
    """Size and time of a file, by which it is known again."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def begins_with(path: Path, start: Path) -> bool:
    """Whether a file's first bytes are all that another holds, as after a copy that was cut short."""
    if start.stat().st_size > path.stat().st_size or not start.is_file():
        return False
    with path.open("rb") as whole, start.open("rb") as part:
        return all(whole.read(len(block)) == block for block in iter(lambda: part.read(READ_BLOCK), b""))


def bring(wanted: Wanted, record: Record, patience: Patience) -> None:
    """Fetch or copy a file, check it, give it its name."""
    partial = Partial(record.raw_dir, wanted.name)
    if isinstance(wanted.source, Path):
        copy(wanted.source, wanted, partial)
    else:
        fetch(wanted.source, wanted, partial, patience)
    sha256 = sha256_of(partial.path)
    if damage := find_damage(partial.path, sha256, wanted):
        partial.discard()
        advice = "what came was deleted; check where it comes from and run the same command again"
        raise UserError(f"{wanted.where}: {wanted.name} {damage}; {advice}")
    record.publish(partial.path, wanted.name, sha256, changed=wanted.changed)
    partial.discard()


def join(archive: str, record: Record) -> str:
    """Make one archive of its parts and delete them; returns what became of it. Raises UserError if one is missing."""
    raw_dir, partial = record.raw_dir, Partial(record.raw_dir, archive)
    partial.discard()
    parts = sorted(name for name in record.files if archive_of(name) == archive and record.is_there(name))
    if not all(map(record.is_joined, parts)):  # else a call was killed while it deleted them
        paths = [raw_dir / part for part in parts]
        if not is_archive(paths):
            what = f"its parts, {parts[0]} to {parts[-1]}, make no whole zip archive"
            raise UserError(f"{raw_dir / archive}: {what}; add the parts that follow, or delete these, and {AGAIN}")
        if shutil.disk_usage(raw_dir).free < sum(path.stat().st_size for path in paths):
            return f"{archive} stays in parts for want of room, which resize can read"
        with partial.path.open("wb") as target:
            for path in paths:
                with path.open("rb") as source:
                    shutil.copyfileobj(source, target, READ_BLOCK)
        hashes = {part: record.files[part]["sha256"] for part in parts}
        record.publish(partial.path, archive, sha256_of(partial.path), parts=hashes)
    for part in parts:
        (raw_dir / part).unlink()
    return f"{archive} is joined"


def download(raw_dir: Path, wanted: Sequence[Wanted], patience: Patience) -> str:
    """Bring every wanted file that is not there yet, join archives; returns what was done and what is next."""
    with sole_process(raw_dir):
        record = Record(raw_dir)
        for entry in wanted:
            if not record.has(entry):  # then an archive joined from another version of it does not count either
                record.files.get(archive_of(entry.name), {}).pop("parts", None)
        missing = [entry for entry in wanted if not record.has(entry)]
        for entry in wanted:
            if entry in missing:
                bring(entry, record, patience)
            else:
                Partial(raw_dir, entry.name).discard()  # of a call killed just after the renaming
        notes = [join(archive, record) for archive in sorted({archive_of(entry.name) for entry in wanted} - {""})]
        size = tqdm.format_sizeof(sum(record.files[entry.name]["size"] for entry in missing), "B", 1024)
    names = ", ".join(entry.name for entry in missing) or "nothing"
    done = [f"brought {names} ({size})", f"{len(wanted) - len(missing)} there already", *notes]
    places = {name: (name, f"{name}.partaa", name.removesuffix(".zip")) for name in NAMES}
    if absent := [name for name in NAMES if not any((raw_dir / place).exists() for place in places[name])]:
        done.append(f"not there yet: {', '.join(absent)}")
    return f"{raw_dir}: {'; '.join(done)}\nnext: {entrypoint('resize', '--raw', raw_dir)}"


def download_from(raw_dir: Path, urls: Path, folder: Path | None) -> str:
    """The verb: download what `urls` lists, or copy from `folder`. Raises UserError for what the user can mend."""
    if folder:
        if folder.resolve() == raw_dir.resolve():
            raise UserError(f"{raw_dir}: both --from and --raw; run {entrypoint('resize', '--raw', raw_dir)}")
        check_apart(raw_dir, folder)
    have = Record(raw_dir).whole()
    return download(raw_dir, find_files(folder, have) if folder else read_list(urls, have), Patience())
