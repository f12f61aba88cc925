"""Files read as if they were one, or a stretch of them as if it were a file: nothing is copied."""

import bisect
import io
import itertools
from collections.abc import Iterable
from typing import Any, BinaryIO


class Joined(io.RawIOBase):
    """`size` bytes from `start` on (all by default) of files laid end to end, seekable. Raises OSError."""

    def __init__(self, paths: Iterable[str], start: int = 0, size: int | None = None) -> None:
        self.files: list[BinaryIO] = []
        try:
            for path in paths:
                self.files.append(open(path, "rb"))  # noqa: SIM115 - they live as long as this object
            sizes = [file.seek(0, io.SEEK_END) for file in self.files]
        except OSError:
            self.close()
            raise
        self.starts = [0, *itertools.accumulate(sizes)]
        self.base = min(start, self.starts[-1])
        room = self.starts[-1] - self.base
        self.size = room if size is None else min(size, room)
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        if origin + offset < 0:
            raise ValueError("seek before the start")
        self.position = origin + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        """Fill what the file under the position can give; 0 at the end."""
        if self.position >= self.size:
            return 0
        place = self.base + self.position
        part = bisect.bisect_right(self.starts, place) - 1
        self.files[part].seek(place - self.starts[part])
        wanted = min(len(buffer), self.size - self.position)
        count = self.files[part].readinto(memoryview(buffer)[:wanted])  # type: ignore[attr-defined]
        self.position += count
        return int(count)

    def close(self) -> None:
        for file in self.files:
            file.close()
        super().close()
