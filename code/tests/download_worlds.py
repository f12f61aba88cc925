"""A split's files, whole and in parts, for the tests of download, and what comes of them."""

import io
import random
import zipfile
from pathlib import Path

from data_scripts import download, transfer

QUICK = transfer.Patience(attempts=2, timeout=10, pause=0.001, longest=0.02)
ZIP, JSONL = "item_valid_images.zip", "item_valid_info.jsonl"


def archive(size: int = 60_000) -> bytes:
    """A zip archive of two entries, too random to be compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in ("a.jpg", "b.jpg"):
            file.writestr(zipfile.ZipInfo(name), random.Random(name).randbytes(size // 2))
    return buffer.getvalue()


CONTENT = {ZIP: archive(), JSONL: b'{"item_id": "1"}\n{"item_id": "2"}\n'}
PARTS = {f"{ZIP}.parta{letter}": CONTENT[ZIP][n * 20_000 : (n + 1) * 20_000] for n, letter in enumerate("abcd")}


def take(raw: Path, folder: Path) -> str:
    return str(download.download(raw, download.find_files(folder, download.Record(raw).whole()), QUICK))


def files(raw: Path) -> dict[str, bytes]:
    """What is in the folder but for the record."""
    return {path.name: path.read_bytes() for path in raw.iterdir() if path.name != ".download.json"}
