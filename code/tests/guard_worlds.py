"""A folder to hand in, with answers hidden in it, for the tests of guard.py."""

import shutil
from pathlib import Path

import orjson

from tongkuan.judge import guard_process

LABELS = [1, 0, 0, 1, 0, 1, 0, 0]
is_guarded = guard_process.landlock_version() > 0 and guard_process.can_filter()


def make_submit(tmp_path: Path) -> Path:
    """A folder to hand in, with answers hidden in it under several names, and answers.jsonl beside it."""
    folder = tmp_path / "submit"
    (folder / "in").mkdir(parents=True)
    ids = [{"src_item_id": "a", "tgt_item_id": f"b{number}"} for number in range(len(LABELS))]
    texts = {"src_item_emb": "[1.0, 1.0]", "tgt_item_emb": "[1.0, 2.0]", "threshold": 0.5}
    pairs = [each | {"item_label": str(label)} for each, label in zip(ids, LABELS, strict=True)]
    (folder / "result.jsonl").write_bytes(b"".join(orjson.dumps(each | texts) + b"\n" for each in ids))
    answers = tmp_path / "answers.jsonl"
    answers.write_bytes(b"".join(orjson.dumps(pair) + b"\n" for pair in pairs))
    (folder / "link.npy").symlink_to(answers)
    (folder / "hard.npy").hardlink_to(answers)
    for name in ("copy.txt", "report.html"):
        shutil.copy(answers, folder / name)
    (folder / "in" / "valid.json").write_bytes(answers.read_bytes() + b"\n")
    return folder


def said(submit: Path, words: str) -> str:
    """The words with the test's own paths."""
    places = {"PAIRS": submit.parent / "answers.jsonl", "SUBMIT": submit, "TOP": submit.parent}
    for name, place in places.items():
        words = words.replace(name, str(place))
    return words
