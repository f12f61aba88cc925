"""cache.py: what is encoded once is not encoded again, and nobody can tell from the result."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event, Timer, current_thread, main_thread
from typing import Any

import pytest
import torch
from commands import ok, run_verb
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from tongkuan.base.errors import UserError
from tongkuan.base.machine import processor_of
from tongkuan.cli.exits import describe
from tongkuan.cli.verbs import main
from tongkuan.encode.cache import Cache
from tongkuan.encode.store import ItemStore, background
from tongkuan.model.towers import TwoTowers
from tongkuan.records.items import item_file
from tongkuan.result.predict import predict

BATCH = 5
BATCHES = 4  # 18 items, 5 a batch
FILES = ("result.jsonl", "manifest.json", "similarity.py")


class Forwards:
    """Counts batches that the model runs on; raises instead of running number `fail_at`."""

    def __init__(self) -> None:
        self.count, self.fail_at = 0, -1

    def taken(self) -> int:
        """How many since the last question."""
        count, self.count = self.count, 0
        return count


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Forwards]:
    counter, real = Forwards(), TwoTowers.forward

    def forward(self: TwoTowers, *tensors: torch.Tensor) -> torch.Tensor:
        if counter.count == counter.fail_at:
            raise RuntimeError("power cut")
        counter.count += 1
        return real(self, *tensors)

    monkeypatch.setattr(TwoTowers, "forward", forward)
    monkeypatch.setattr("tongkuan.encode.encode.available_cores", lambda: 1)
    return counter


@pytest.fixture
def own(data: Path, tmp_path: Path) -> Path:
    """A data folder to change, with a broken picture and a missing one."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    (folder / "images" / "test-1-1.png").write_bytes(b"no picture")
    (folder / "images" / "test-2-0.png").unlink()
    return folder


def written(submit: Path) -> list[bytes]:
    return [(submit / name).read_bytes() for name in FILES]


def run(data: Path, model: Path, submit: Path, cache: Path | None, precision: str = "fp32") -> list[bytes]:
    predict(data, "test", model, submit, BATCH, precision, cache_dir=cache)
    return written(submit)


def test_a_second_run_encodes_nothing_and_writes_the_same_bytes(
    own: Path, model: Path, tmp_path: Path, forwards: Forwards, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = run(own, model, tmp_path / "plain", None)
    assert forwards.taken() == BATCHES
    for expected in (BATCHES, 0):
        capsys.readouterr()
        assert run(own, model, tmp_path / "cached", tmp_path / "cache") == plain
        assert forwards.taken() == expected
        assert "2 pictures are missing or unreadable" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").iterdir())) == BATCHES


def test_what_is_cached_is_not_decoded(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run(data, model, tmp_path / "s", tmp_path / "cache")
    monkeypatch.setattr("tongkuan.encode.store.read_image", lambda *_: pytest.fail("decoded"))
    assert run(data, model, tmp_path / "s", tmp_path / "cache") == before


def test_a_changed_picture_or_text_costs_its_batch_and_gives_what_a_run_without_cache_gives(
    own: Path, model: Path, tmp_path: Path, forwards: Forwards
) -> None:
    cache = tmp_path / "cache"
    run(own, model, tmp_path / "s", cache)
    for change, least, most in (("picture", 1, 1), ("repaired", 1, 1), ("text", 1, BATCHES)):
        if change == "text":
            path = item_file(own, "test")
            path.write_bytes(path.read_bytes().replace("正品".encode(), "大大".encode(), 1))
        else:
            name = "test-0-0.png" if change == "picture" else "test-2-0.png"
            Image.new("RGB", (16, 16), (1, 2, 3)).save(own / "images" / name)
        forwards.taken()
        cached = run(own, model, tmp_path / "s", cache)
        assert least <= forwards.taken() <= most, change
        assert cached == run(own, model, tmp_path / "plain", None), change


def test_another_model_precision_or_batch_is_a_miss(
    data: Path, model: Path, tmp_path: Path, forwards: Forwards
) -> None:
    cache, other = tmp_path / "cache", tmp_path / "other.safetensors"
    with safe_open(model, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file({name: tensor + 0.001 for name, tensor in tensors.items()}, other, metadata=file.metadata())
    run(data, model, tmp_path / "s", cache)
    assert forwards.taken() == BATCHES
    run(data, other, tmp_path / "s", cache)
    assert forwards.taken() == BATCHES
    run(data, model, tmp_path / "s", cache, "bf16")
    assert forwards.taken() == BATCHES, "those at fp32, to compare verdicts with, are there"
    predict(data, "test", model, tmp_path / "s", 6, cache_dir=cache)
    assert forwards.taken() == 3


def test_a_failed_run_keeps_its_finished_batches(data: Path, model: Path, tmp_path: Path, forwards: Forwards) -> None:
    forwards.fail_at = 2
    with pytest.raises(RuntimeError, match="power cut"):
        run(data, model, tmp_path / "s", tmp_path / "cache")
    forwards.fail_at = -1
    assert forwards.taken() == 2
    resumed = run(data, model, tmp_path / "s", tmp_path / "cache")
    assert forwards.taken() == BATCHES - 2
    assert resumed == run(data, model, tmp_path / "plain", None)


@pytest.mark.slow
def test_one_rank_two_and_one_again_share_a_cache(own: Path, model: Path, tmp_path: Path, forwards: Forwards) -> None:
    cache, submit = tmp_path / "cache", tmp_path / "s"
    forwards.fail_at = 2
    with pytest.raises(RuntimeError, match="power cut"):
        run(own, model, submit, cache)
    forwards.fail_at = -1
    stamps = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    (cache / f".{min(stamps).name}.part").write_bytes(b"what a killed run leaves")
    words = ("--data", own, "--model", model, "--submit", submit, "--cache", cache, "--encode-batch", 5)
    ok(run_verb("predict", *words, "--nproc", 2))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())  # read, not written
    two = written(submit)
    forwards.taken()
    assert run(own, model, submit, cache) == two
    assert forwards.taken() == 0
    assert run(own, model, tmp_path / "plain", None) == two


def test_a_slow_disk_is_not_waited_for_between_batches(
    data: Path, model: Path, tmp_path: Path, forwards: Forwards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write ends only when all batches are computed; files come in the order of the batches all the same."""
    plain, is_computed, order, save = run(data, model, tmp_path / "plain", None), Event(), [], Cache.save
    forwards.taken()

    def slow(self: Cache, store: ItemStore, item_ids: Sequence[str], *rest: Any) -> None:
        assert is_computed.wait(60) and current_thread() is not main_thread()
        order.append(tuple(item_ids))
        save(self, store, item_ids, *rest)

    def shown(_: object, count: float) -> None:
        if forwards.count == BATCHES:
            is_computed.set()

    monkeypatch.setattr(Cache, "save", slow)
    monkeypatch.setattr("tongkuan.encode.encode.tqdm.update", shown)
    assert run(data, model, tmp_path / "s", tmp_path / "cache") == plain
    assert len(order) == BATCHES == len(list((tmp_path / "cache").iterdir()))
    batches = order.copy()
    order.clear()
    run(data, model, tmp_path / "s", tmp_path / "other")
    assert order == batches


@pytest.mark.parametrize("most", [1, 16])
def test_a_disk_that_fills_up_ends_the_run_in_one_line(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr("tongkuan.encode.encode.WRITES_WAITING", most)
    monkeypatch.setattr("tongkuan.base.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left") as caught:
        run(data, model, tmp_path / "s", tmp_path / "cache")
    line = describe(caught.value, "predict")
    assert line.startswith(str(tmp_path / "cache")) and "make room" in line and "\n" not in line
    assert not list((tmp_path / "cache").iterdir()) and not list((tmp_path / "s").glob("*"))


def test_no_more_than_some_writes_wait_and_their_errors_come_out() -> None:
    done: list[int] = []
    go = Event()
    with background(2) as later:
        later(lambda: go.wait(60))
        later(lambda: done.append(1))
        Timer(0.05, go.set).start()
        later(lambda: done.append(2))  # waits for the first
        assert go.is_set()
    assert done == [1, 2]
    with pytest.raises(RuntimeError, match="a fault"), background(2) as later:
        later(lambda: done.append(3))
        raise RuntimeError("a fault")
    assert done[-1] == 3, "what was handed over is done"
    with pytest.raises(ZeroDivisionError), background(2) as later:
        later(lambda: 1 / 0)


def test_a_damaged_file_is_computed_again(data: Path, model: Path, tmp_path: Path, forwards: Forwards) -> None:
    before = run(data, model, tmp_path / "s", tmp_path / "cache")
    cut, flipped, empty, swapped = sorted((tmp_path / "cache").iterdir())
    whole = {path: path.read_bytes() for path in (cut, flipped, empty, swapped)}
    cut.write_bytes(whole[cut][:-4])
    flipped.write_bytes(whole[flipped][:-1] + bytes([whole[flipped][-1] ^ 1]))
    empty.write_bytes(b"")
    swapped.write_bytes(whole[cut])
    forwards.taken()
    assert run(data, model, tmp_path / "s", tmp_path / "cache") == before
    assert forwards.taken() == BATCHES
    assert all(path.read_bytes() == data for path, data in whole.items())


def test_evaluate_shares_it(
    data: Path, model: Path, tmp_path: Path, forwards: Forwards, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "--data", str(data), "--model", str(model), "--encode-batch", "5"]
    capsys.readouterr()  # what making the model printed
    outs = []
    for more in ([], ["--cache", str(tmp_path / "cache")], ["--cache", str(tmp_path / "cache")]):
        main([*words, *more])
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] == outs[2]
    assert forwards.taken() == 2 * BATCHES


def test_a_cache_that_cannot_be_written_is_refused_before_any_work(data: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ["--data", str(data), "--model", str(model), "--cache", str(tmp_path / "file" / "cache")]
    for verb in (["predict", "--submit", str(tmp_path / "s")], ["evaluate"]):
        with pytest.raises(UserError, match="cannot write here") as caught:
            main([*verb, *words])
        assert "\n" not in str(caught.value)


def test_the_key_tells_processors_apart(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    here = Cache(tmp_path, model, "fp32", device)
    assert here._recipe == Cache(tmp_path, model, "fp32", device)._recipe
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "ABACUS")
    assert "ABACUS" in processor_of(device)
    assert here._recipe != Cache(tmp_path, model, "fp32", device)._recipe
