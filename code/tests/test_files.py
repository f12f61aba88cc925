"""Files: published whole or not at all, and a folder that refuses them is the user's to mend, said at once."""

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tongkuan.base import files
from tongkuan.base.errors import UserError, unwritable
from tongkuan.base.files import check_writable, publish, sha256_of

NOBODY = 65534


@contextmanager
def without_privileges() -> Iterator[None]:
    """As a user whom permissions bind: root may write anywhere."""
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that anyone may enter and nobody may write to; pytest's own lie where only their owner may enter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "old").write_text("old")
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_published_file_is_whole_alone_and_readable_by_all(tmp_path: Path) -> None:
    with publish(tmp_path / "new" / "deep" / "file.bin") as file:
        file.write(b"content")
    path = tmp_path / "new" / "deep" / "file.bin"
    assert path.read_bytes() == b"content"
    assert names(path.parent) == ["file.bin"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_text_is_utf_8_with_plain_line_ends(tmp_path: Path) -> None:
    with publish(tmp_path / "file.txt", "w") as file:
        file.write("同款\nx\n")
    assert (tmp_path / "file.txt").read_bytes() == "同款\nx\n".encode()


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with publish(path, "w") as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), publish(path, "w") as file:
        file.write("half")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_rename_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file" / "full").mkdir(parents=True)  # a folder is in the way
    with pytest.raises(OSError), publish(tmp_path / "file") as file:
        file.write(b"x")
    assert names(tmp_path) == ["file"]


def test_a_disk_that_fails_at_the_last_moment_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"), publish(tmp_path / "file", "w") as file:
        file.write("new")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_read_only_folder_is_the_users_to_mend(read_only: Path) -> None:
    with without_privileges():
        with pytest.raises(UserError, match=r"cannot write here.*mount it writable"), publish(read_only / "old"):
            raise AssertionError("must not come this far")
        with pytest.raises(UserError, match="cannot write here"):
            check_writable(read_only)
        with pytest.raises(UserError, match="cannot write here"), publish(read_only / "sub" / "file"):
            raise AssertionError("must not come this far")
    assert names(read_only) == ["old"]
    assert (read_only / "old").read_text() == "old"


def test_a_file_where_a_folder_should_be_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write here"):
        check_writable(tmp_path / "file")
    with pytest.raises(UserError, match="cannot write here"), publish(tmp_path / "file" / "below"):
        raise AssertionError("must not come this far")


def test_checking_a_folder_makes_it_and_leaves_it_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []


def test_a_failing_disk_is_not_called_the_users_fault(tmp_path: Path) -> None:
    assert isinstance(unwritable(tmp_path, OSError(errno.EROFS, "")), UserError)
    error = OSError(errno.EIO, "")
    assert unwritable(tmp_path, error) is error


@pytest.mark.parametrize("size", [0, 1, files.READ_BLOCK, files.READ_BLOCK + 1])
def test_the_digest_is_of_every_byte(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()
