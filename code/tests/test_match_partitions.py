"""`match run` by several processes: each encodes partitions of its own; the catalogue is as one process makes it."""

import shutil
from pathlib import Path

import pytest
from test_main import error_of
from test_match_run import match
from worlds import snapshot

from tongkuan.base.errors import UserError
from tongkuan.base.files import sole_process


@pytest.fixture(scope="module")
def whole(data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one process, three partitions; no test changes it."""
    return match(data, model, tmp_path_factory.mktemp("match") / "out", "--threshold", -4)


def there(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def test_jobs_with_partitions_of_their_own_leave_what_one_process_makes(
    whole: Path, data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = match(data, model, tmp_path / "out", "--threshold", -4, "--partitions", "1:2")
    assert there(out) == ["embeddings/part-000001.parquet"]
    said = capsys.readouterr().out
    assert "1 of 3 partitions done here, 1 are there" in said
    assert said.endswith("next: the other partitions, then the same command without --partitions\n")
    match(data, model, out, "--threshold", -4, "--partitions", "2:9")
    match(data, model, out, "--threshold", -4, "--partitions", ":1")
    assert capsys.readouterr().out.endswith("3 are there\nnext: the same command without --partitions\n")
    made = snapshot(out)
    match(data, model, out, "--threshold", -4)
    assert snapshot(out) == snapshot(whole)
    assert made.items() <= snapshot(out).items()  # none of them was made twice


def test_a_job_leaves_the_files_of_others_alone(whole: Path, data: Path, model: Path, tmp_path: Path) -> None:
    """Those beyond its own, and those of another size of partitions, which only a whole run clears away."""
    out = shutil.copytree(whole, tmp_path / "out")
    (out / "embeddings" / "part-000002.parquet").write_bytes(b"another's")
    (out / "embeddings" / "part-000007.parquet").write_bytes(b"another's")
    match(data, model, out, "--threshold", -4, "--partitions", "0:2")
    wanted = {path: content for path, content in snapshot(whole).items() if path != "manifest.json"}
    found = snapshot(out)
    assert found.pop("embeddings/part-000002.parquet") == found.pop("embeddings/part-000007.parquet")
    assert wanted.items() >= found.items()  # a manifest would speak of what is not there
    assert "manifest.json" not in found
    match(data, model, out, "--threshold", -4)
    assert snapshot(out) == snapshot(whole)


def test_jobs_run_beside_each_other_and_never_beside_a_whole_run(data: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with sole_process(out, shared=True):
        match(data, model, out, "--partitions", "0:1")
        with pytest.raises(UserError, match="another process fills this folder"):
            match(data, model, out)
    with sole_process(out), pytest.raises(UserError, match="another process fills this folder"):
        match(data, model, out, "--partitions", "1:2")
    assert there(out) == ["embeddings/part-000000.parquet"]


def test_partitions_that_are_not_there_cost_nothing(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An array of jobs may be longer than a catalogue."""
    match(data, model, tmp_path / "out", "--partitions", "3:6")
    assert "0 of 3 partitions done here, 0 are there" in capsys.readouterr().out
    assert there(tmp_path / "out") == []


@pytest.mark.parametrize("text", ["1", "2:1", "1:1", "-1:", ":0", "a:b", "1:2:3"])
def test_what_is_no_span_is_named(text: str, data: Path, model: Path, tmp_path: Path) -> None:
    words = ("match", "run", "--data", data, "--model", model, "--out", tmp_path, f"--partitions={text}")
    assert "is no A:B with A below B" in error_of(*words)
