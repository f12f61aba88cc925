"""Files: published whole or not at all, and a folder that refuses them is the user's to mend, said at once."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from commands import environment, without_root

from data_scripts.transfer import Partial
from tongkuan.base.errors import FailureError, UserError, unwritable
from tongkuan.base.files import check_target, check_writable, part_of, publish, sha256_of

# A writer with a child that inherits what may be inherited; it says so in the midst of a file.
WRITER = """
import subprocess, sys, time
from pathlib import Path
from tongkuan.base.files import publish
with publish(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print(subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL).pid, flush=True)
    time.sleep(60)
"""


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


def write(path: Path, content: bytes) -> None:
    with publish(path) as file:
        file.write(content)


def test_a_file_appears_whole_alone_and_readable_by_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "file.bin"
    for before, content in ((b"", b"old"), (b"old", b"new")):
        with publish(path) as file:
            file.write(content)
            file.flush()
            assert path.read_bytes() == before if before else not path.exists()
        assert path.read_bytes() == content and names(path.parent) == ["file.bin"]
        assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), publish(path) as file:
        file.write(b"half")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_after_sigkill_the_next_writer_leaves_nothing_and_waits_for_no_child(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    write(path, b"old")
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.kill()
    try:
        assert path.read_bytes() == b"old" and part_of(path).read_bytes() == b"half"
        write(path, b"new")
    finally:
        os.kill(child, signal.SIGKILL)
    assert path.read_bytes() == b"new" and names(tmp_path) == ["file"]
    assert "waiting" not in capsys.readouterr().err


def test_writers_of_one_file_take_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    others = [threading.Thread(target=write, args=(path, digit * 1000)) for digit in (b"1", b"2", b"3")]
    with publish(path) as file:
        for other in others:
            other.start()
        others[0].join(0.2)
        assert all(other.is_alive() for other in others) and not path.exists()
        file.write(b"0")
    for other in others:
        other.join()
    assert path.read_bytes() in (b"1" * 1000, b"2" * 1000, b"3" * 1000) and names(tmp_path) == ["file"]
    assert f"waiting for another process that writes {part_of(path)}" in capsys.readouterr().err


def test_without_locks_the_first_of_two_writers_ends_with_an_error(tmp_path: Path) -> None:
    path, refusal = tmp_path / "file", OSError(errno.ENOLCK, "no locks here")
    with (
        patch.object(fcntl, "flock", side_effect=refusal),
        pytest.raises(FailureError, match="file: replaced while it was written"),
        publish(path),
    ):
        write(path, b"second")
    assert path.read_bytes() == b"second" and names(tmp_path) == ["file"]


PLANTED: dict[str, Callable[[Path, Path], object]] = {
    "link": Path.symlink_to,
    "second name": Path.hardlink_to,
    "pipe": lambda path, _: os.mkfifo(path),
    "closed file": lambda path, _: path.touch(0),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_what_was_planted_under_the_temporary_name_is_not_written_through(tmp_path: Path, kind: str) -> None:
    path, theirs = tmp_path / "file", tmp_path / "theirs"
    theirs.write_text("theirs")
    PLANTED[kind](part_of(path), theirs)
    write(path, b"ours")
    assert (path.read_text(), theirs.read_text()) == ("ours", "theirs")
    assert not path.is_symlink() and names(tmp_path) == ["file", "theirs"]


@pytest.mark.parametrize("name", [".file.part", ".file.part.json"])
def test_a_link_is_no_part_of_a_download(tmp_path: Path, name: str) -> None:
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / name).symlink_to("theirs")
    partial = Partial(tmp_path, "file")
    partial.begin("validator", 3)
    partial.path.write_bytes(b"our")
    assert (tmp_path / "theirs").read_text() == "theirs"


def test_a_folder_in_the_files_place_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file" / "full").mkdir(parents=True)
    with pytest.raises(OSError):
        write(tmp_path / "file", b"x")
    assert names(tmp_path) == ["file"]
    part_of(tmp_path / "other").mkdir()
    for name in ("file", "other"):
        with pytest.raises(UserError, match="a folder, where a file goes"):
            check_target(tmp_path / name)


def test_a_disk_that_fails_at_the_last_moment_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with patch("os.fsync", side_effect=OSError(errno.ENOSPC, "no space left")):
        with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
            write(path, b"new")
        assert path.read_text() == "old" and names(tmp_path) == ["file"]
        with publish(path, sync=False) as file:
            file.write(b"new")
    assert path.read_text() == "new"


def test_a_read_only_folder_is_the_users_to_mend(read_only: Path) -> None:
    with without_root():
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


def test_a_failing_disk_is_not_called_the_users_error(tmp_path: Path) -> None:
    assert isinstance(unwritable(tmp_path, OSError(errno.EROFS, "")), UserError)
    error = OSError(errno.EIO, "")
    assert unwritable(tmp_path, error) is error


def test_the_digest_is_of_every_byte(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
