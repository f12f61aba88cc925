"""Turn what the organiser hands out into what train reads: square JPEGs, items, pairs, and a ledger of every picture.

./entrypoint.sh resize --raw data/raw --data data
"""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

from tqdm import tqdm

from data_scripts.archives.sources import Source, find_source
from data_scripts.linking.ledger import STATUSES, Digests, Picture, assign_names, list_pictures, write_ledger
from data_scripts.linking.links import Links, Records, link_pictures, loss_lines, names_found
from data_scripts.linking.matching import Matches
from tongkuan.base.errors import UserError, entrypoint, missing
from tongkuan.base.files import check_apart, check_writable, publish
from tongkuan.base.machine import keep_freed_memory
from tongkuan.records.attributes import DEFAULT_KEYS, TEN_KEYS, coverage_lines
from tongkuan.records.items import (
    HANDED_OUT,
    SPLITS,
    info_row,
    item_file,
    pair_file,
    pair_row,
    read_item_rows,
    read_pairs,
)
from tongkuan.records.pictures import UnreadableError, silence_pillow, squash
from tongkuan.records.rows import is_given
from tongkuan.records.streams import absent

ANSWERS = "item_test_answers.jsonl"
LEDGER = "ledger.jsonl"
UNDER_WAY = ".resize"  # in DATA until the ledger is there: what a killed run left is ours to write over
ADVICE = "run ./entrypoint.sh download for the organiser's files, or ./entrypoint.sh demo for made-up ones"
MIN_TASKS = 32  # pictures a worker: starting one takes as long as these


# ---------------------------------------------------------------------------------------------------------------------
# All pictures


# What a pool's process reads from: set once by `start_worker`, since an open archive cannot travel with each task.
worker_sources: dict[str, Source] = {}
Task: TypeAlias = tuple[str, Any, str, int]  # split, key, where to write, size
Outcome: TypeAlias = tuple[str, str, int, int]  # ok, repaired or unreadable; detail; width; height


def start_worker(sources: dict[str, Source]) -> None:
    """Set a pool's process up: its archives are opened, and it ends when the process that started it does."""
    worker_sources.update(sources)
    keep_freed_memory()
    silence_pillow()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Wait for the parent's end. Idle workers would otherwise outlive a killed parent for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def convert_in_worker(task: Task) -> Outcome:
    return convert(worker_sources, task)


def convert(sources: dict[str, Source], task: Task) -> Outcome:
    """Read, squash and write one picture; what cannot be read is an outcome, not an error."""
    split, key, target, size = task
    try:
        data, status, detail, width, height = squash(sources[split].read(key), size)
    except UnreadableError as error:
        return "unreadable", str(error), error.width, error.height
    # To fsync each is ten times slower on a disk: the ledger, written and fsynced last, makes a set valid.
    with publish(Path(target), sync=False) as file:
        file.write(data)
    return status, detail, width, height


def convert_all(pictures: list[Picture], sources: dict[str, Source], images: Path, size: int, workers: int) -> None:
    """Convert every picture that has no twin and fill in the ledger's fields of all; the same with any `workers`."""
    own = [picture for picture in pictures if not picture.twin]
    tasks: list[Task] = [(picture.split, picture.key, str(images / picture.image), size) for picture in own]
    workers = min(workers, len(tasks) // MIN_TASKS)
    with ExitStack() as stack:
        if workers > 1:
            # spawn: forking a process that has threads (torch, tqdm) can hang.
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(workers, context, start_worker, (sources,))
            stack.callback(pool.shutdown, cancel_futures=True)
            outcomes = pool.map(convert_in_worker, tasks, chunksize=8)
        else:
            silence_pillow()
            outcomes = (convert(sources, task) for task in tasks)
        try:
            for picture, outcome in tqdm(
                zip(own, outcomes, strict=True), total=len(own), desc="resize", unit=" pictures", disable=None
            ):
                apply_outcome(picture, outcome)
        except BrokenProcessPool as error:
            raise UserError(
                "resize: a worker process was killed, for want of memory most likely; run again with --workers 1"
            ) from error
    for picture in pictures:
        if twin := picture.twin:
            picture.image, picture.width, picture.height = twin.image, twin.width, twin.height
            if not twin.image:
                picture.status, picture.detail = "unreadable", f"{picture.detail}: {twin.detail}"
                picture.cause = twin.cause


def apply_outcome(picture: Picture, outcome: Outcome) -> None:
    """Write an outcome into the picture's ledger fields. `unreadable` and `repaired` win over `duplicate`."""
    status, detail, picture.width, picture.height = outcome
    if status == "unreadable":
        picture.image, picture.cause = "", detail
    if status != "ok":
        picture.status = status
    picture.detail = "; ".join(part for part in (detail, picture.detail) if part)


# ---------------------------------------------------------------------------------------------------------------------
# Items, pairs and the ledger


def read_split(raw_dir: Path, split: str) -> tuple[Records, Source | None] | None:
    """A split's records and its pictures' source, which may be None when no item names a picture.

    None when nothing is there, UserError when only half of it is.
    """
    info, pair = item_file(raw_dir, split), pair_file(raw_dir, split)
    lines = list(read_item_rows(info, ADVICE)) if is_given(info) else []
    items = {item.item_id: item for item, _ in lines}
    names = list(dict.fromkeys(item.image_name for item in items.values() if item.image_name))
    source = find_source(raw_dir, split, names)
    if not is_given(info) and not is_given(pair) and source is None:
        return None
    for path in (info, pair):
        if not is_given(path):
            raise absent(path, f"missing, while other files of {split} are there; {ADVICE}")
    if source is None and names:
        pictures = f"item_{split}_images"
        raise missing(
            raw_dir,
            f"no pictures of {split}, though its items name some; put {pictures}.zip, {pictures}.zip.partaa… or the "
            f"folder {pictures} there, or {ADVICE}",
        )
    rows = [(item.item_id, row) for item, row in lines]
    return Records(items, rows, read_pairs(pair, items, "optional", info, ADVICE)), source


def write_records(data_dir: Path, records: dict[str, Records], images: dict[str, dict[str, str]]) -> None:
    """Publish items and pairs of each split, those of train and valid once more for `split` to read."""
    for split, record in records.items():
        folders = [data_dir] if split == "test" else [data_dir / HANDED_OUT, data_dir]
        for folder in folders:
            with publish(item_file(folder, split)) as file:
                for item_id, row in record.rows:
                    file.write(info_row(row, images[split][item_id]))
            with publish(pair_file(folder, split)) as file:
                file.writelines(map(pair_row, record.pairs))


def clear_earlier(data_dir: Path, splits: Iterable[str], has_answers: bool) -> None:
    """Take back what says that an earlier set is whole, and what split made of it. UserError if it had more splits.

    Splits of two runs must not mix: the pictures of one could replace the other's.
    """
    places = {split: item_file(data_dir if split == "test" else data_dir / HANDED_OUT, split) for split in SPLITS}
    earlier = [path for split, path in places.items() if split not in splits]
    earlier += [] if has_answers else [data_dir / ANSWERS]
    for path in earlier:
        if path.exists():
            raise UserError(f"{path}: from an earlier run, but the raw folder has none; name another --data folder")
    (data_dir / UNDER_WAY).touch()
    made_by_split = data_dir / "split.json"
    if made_by_split.exists():
        for split in ("train", "valid"):
            item_file(data_dir, split).unlink(missing_ok=True)
            pair_file(data_dir, split).unlink(missing_ok=True)
        made_by_split.unlink()
    (data_dir / LEDGER).unlink(missing_ok=True)


def check_folders(raw_dir: Path, data_dir: Path) -> None:
    """Raise UserError if this would write over what it reads, or over item files that it did not make."""
    inputs = [raw_dir, *(raw_dir / f"item_{split}_images" for split in SPLITS)]
    for folder in (data_dir, data_dir / HANDED_OUT, data_dir / "images"):
        check_apart(folder, *inputs)
        for split in SPLITS:
            for place in (item_file, pair_file):
                check_apart(place(folder, split), place(raw_dir, split))
    for folder in (data_dir, data_dir / HANDED_OUT, data_dir / "images"):
        if folder.is_dir():
            check_writable(folder)
    folders = (data_dir, data_dir / HANDED_OUT)
    files = [place(folder, split) for folder in folders for split in SPLITS for place in (item_file, pair_file)]
    check_own(data_dir, [*files, data_dir / ANSWERS])


def check_own(data_dir: Path, files: Iterable[Path]) -> None:
    """Raise UserError if one of the files is there and no earlier run of ours made this folder."""
    if (data_dir / LEDGER).exists() or (data_dir / UNDER_WAY).exists():
        return
    if theirs := next((path for path in files if path.exists()), None):
        raise UserError(f"{theirs}: not made by resize, which would write over it; name another folder with --data")


def check_readable(
    raw_dir: Path, records: dict[str, Records], sources: dict[str, Source], matches: Matches, size: int
) -> None:
    """Raise UserError with the commonest cause when items name pictures and none of them can be had.

    Reads up to the first readable picture, and all where there is none.
    """
    silence_pillow()
    for picture in itertools.chain(matches.claims.names, matches.everywhere.pictures):
        try:
            squash(sources[picture.split].read(picture.key), size)
        except UnreadableError as error:
            picture.cause = str(error)
            continue
        if picture in matches.claims.names:
            return
        picture.image = picture.name
    links = link_pictures(records, matches)
    if links.num_named and not links.has_pictures():
        cause = links.commonest()[0]
        problem = f"none of the {links.num_named:,} items that name a picture gets one: {cause.count:,} {cause}"
        raise UserError(f"{raw_dir}: {problem}{names_found(matches.everywhere.pictures) if cause.is_missing else ''}")
    for picture in matches.everywhere.pictures:
        picture.image = picture.cause = ""


def resize(raw_dir: Path, data_dir: Path, size: int, workers: int) -> str:
    """Make `data_dir` from `raw_dir` and return the closing lines. Raises UserError before anything is changed."""
    present = {split: found for split in SPLITS if (found := read_split(raw_dir, split))}
    if not present:
        raise missing(raw_dir, f"no item_{{train,valid,test}}_info.jsonl, _pair.jsonl and _images.zip here; {ADVICE}")
    records = {split: record for split, (record, _) in present.items()}
    sources = {split: source for split, (_, source) in present.items() if source}
    for note in (note for source in sources.values() for note in source.notes):
        print(note)
    answers = raw_dir / ANSWERS
    answer_pairs = read_pairs(answers, advice=ADVICE) if is_given(answers) else []
    check_folders(raw_dir, data_dir)
    pictures, digests = list_pictures(sources), Digests(sources)
    matches = Matches({split: record.items.values() for split, record in records.items()}, pictures, digests)
    check_readable(raw_dir, records, sources, matches, size)
    images = data_dir / "images"
    assign_names(pictures, digests)
    check_own(data_dir, (images / picture.image for picture in pictures))
    for folder in (data_dir, images, *([data_dir / HANDED_OUT] if present.keys() - {"test"} else [])):
        check_writable(folder)
    clear_earlier(data_dir, present, bool(answer_pairs))
    convert_all(pictures, sources, images, size, workers)
    links = link_pictures(records, matches)
    links.mark()
    write_records(data_dir, records, links.images)
    if answer_pairs:
        with publish(data_dir / ANSWERS) as file:
            file.writelines(map(pair_row, answer_pairs))
    write_ledger(data_dir / LEDGER, [*pictures, *links.absent])
    (data_dir / UNDER_WAY).unlink()
    items = [item for record in records.values() for item in record.items.values()]
    return summary(data_dir, pictures, links, coverage_lines(items, TEN_KEYS, asked=DEFAULT_KEYS))


def summary(data_dir: Path, pictures: list[Picture], links: Links, coverage: Sequence[str]) -> str:
    """What was made, what is wrong with it, and what to type next; `coverage` is what there is to say of attributes."""
    counts = Counter(picture.status for picture in [*pictures, *links.absent])
    statuses = ", ".join(f"{status} {counts[status]:,}" for status in STATUSES)
    unnamed = sum(not picture.is_named for picture in pictures)
    items = ", ".join(f"{split} {len(by_id):,}" for split, by_id in links.images.items())
    verb = "split" if {"train", "valid"} & set(links.images) else "predict"
    return "\n".join(
        [
            f"pictures: {statuses} (each with its reason in {data_dir / LEDGER}); {unnamed:,} that no item names",
            f"items: {items}; {links.num_bare():,} without a picture",
            *loss_lines(links),
            *coverage,
            f"next: {entrypoint(verb, '--data', data_dir)}",
        ]
    )
