"""Partitions worked on by other machines: what travels, what comes back, and what such a machine refuses."""

import pickle
import signal
import socket
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_main import error_of
from test_match_run import match
from worlds import make_data, read_jsonl, snapshot, write_jsonl

from tongkuan.base.errors import FailureError, UserError
from tongkuan.cli.exits import stop
from tongkuan.match import cluster, run
from tongkuan.match.machines import EncodedPart, Part
from tongkuan.match.ship import Encoder, Shipment

CODE = Path(__file__).resolve().parents[1]


def sent(value: Any) -> Any:
    """As it arrives at another machine: arrays cannot be written to there."""
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(content, buffers=[bytes(buffer) for buffer in buffers])


class Elsewhere:
    """Another machine, which cannot see the data folder; its results come in another order."""

    def __init__(self, data: Path) -> None:
        self.data = data

    def each(self, work: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        places = list(range(len(jobs)))[::-1]
        hidden = self.data.rename(self.data.with_name("hidden"))
        done = [sent(sent(work)(sent(jobs[place]))) for place in places]
        hidden.rename(self.data)
        yield from zip(places, done, strict=True)

    def encode(self, run: Any, store: Any, parts: Sequence[Part]) -> Iterator[tuple[int, EncodedPart]]:
        return self.each(Encoder.of(run), [Shipment.of(store, part) for part in parts])


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A data folder with pictures that are missing, broken, in a folder, and of no name that a file can have."""
    data = make_data(tmp_path / "data")
    rows = read_jsonl(data / "item_test_info.jsonl")
    (data / "images" / "inner").mkdir()
    (data / "images" / "test-0-0.png").rename(data / "images" / "inner" / "test-0-0.png")
    rows[0]["item_image_name"] = "../inner/test-0-0.png"
    rows[1]["item_image_name"] = "no\0name.png"
    (data / "images" / "test-3-0.png").unlink()
    (data / "images" / "test-3-1.png").write_bytes(b"no picture")
    write_jsonl(data / "item_test_info.jsonl", rows)
    return data


@pytest.mark.parametrize("more", [(), ("--engine", "exact"), ("--engine", "faiss", "--threshold", -4)])
def test_a_catalogue_has_the_same_bytes_wherever_its_partitions_are_worked_on(
    more: tuple[object, ...], own: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tongkuan.match.search.FEW", 0)
    here = match(own, model, tmp_path / "here", *more)
    monkeypatch.setattr(run, "open_machines", lambda *_: nullcontext(Elsewhere(own)))
    assert snapshot(match(own, model, tmp_path / "there", *more)) == snapshot(here)
    assert snapshot(here).keys() >= {"manifest.json", "pairs/part-000002.parquet"}


def test_a_machine_that_would_come_to_other_numbers_encodes_nothing(
    own: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "open_machines", lambda *_: nullcontext(Elsewhere(own)))
    call = Encoder.__call__

    def on_another_processor(self: Encoder, shipment: Shipment) -> EncodedPart:
        with pytest.MonkeyPatch.context() as patch:
            for module in ("encode.cache", "match.ship"):
                patch.setattr(f"tongkuan.{module}.processor_of", lambda _: "cpu of another make")
            return call(self, shipment)

    monkeypatch.setattr(Encoder, "__call__", on_another_processor)
    line = error_of("match", "run", "--data", own, "--model", model, "--out", tmp_path / "out")
    assert "would come to other numbers: it has cpu of another make and not cpu" in line
    assert not (tmp_path / "out" / "embeddings").exists()


class FakeRay:
    """Ray, of one node with two cores, whose tasks run when they are waited for."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.most, self.running = error, 0, 0
        self.exceptions = SimpleNamespace(RayTaskError=TaskError, RayError=LostNodeError, RaySystemError=ImportError)

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 1.0}}]

    def put(self, value: Any) -> Any:
        return value

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        assert options == {"num_cpus": 2.0, "num_gpus": 0, "max_retries": cluster.RETRIES}

        def started(*arguments: Any) -> tuple[Any, ...]:
            self.running += 1
            self.most = max(self.most, self.running)
            return arguments

        return lambda function: SimpleNamespace(remote=started)

    def wait(self, tasks: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        self.running -= 1
        return tasks[-1:], tasks[:-1]

    def get(self, task: tuple[Any, ...]) -> Any:
        if self.error:
            raise self.error
        return cluster.perform(*task)


class LostNodeError(Exception):
    pass


class TaskError(LostNodeError):
    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause


def test_a_cluster_is_given_no_more_at_a_time_than_it_has_room_for_and_one() -> None:
    ray = FakeRay()
    found = dict(cluster.Cluster(ray).each(abs, [-1, -2, -3, -4, -5]))
    assert found == {0: 1, 1: 2, 2: 3, 3: 4, 4: 5}
    assert ray.most == 2


def test_what_ends_a_task_ends_the_run_with_the_same_error() -> None:
    with pytest.raises(ValueError, match="of the task"):
        list(cluster.Cluster(FakeRay(TaskError(ValueError("of the task")))).each(abs, [1]))
    cause = ImportError("No module named 'tongkuan'\nand more")
    with pytest.raises(UserError, match=r"a node cannot run this program .*; install the same on all nodes"):
        list(cluster.Cluster(FakeRay(TaskError(cause))).each(abs, [1]))
    with pytest.raises(FailureError, match=r"lost 6 times \('the node died'\); the same command goes on"):
        list(cluster.Cluster(FakeRay(LostNodeError("the node died\nand more"))).each(abs, [1]))


def test_a_request_to_stop_keeps_its_exit_code_though_ray_makes_it_another() -> None:
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(SystemExit) as caught, cluster.stopped_as(stop):
            try:
                signal.raise_signal(signal.SIGTERM)
            except SystemExit:
                sys.exit(1)  # as Ray does
        assert caught.value.code == 143 and signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)


def test_without_ray_or_with_ranks_of_this_machine_a_line_says_what_to_do(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("match", "run", "--data", data, "--model", model, "--out", tmp_path / "out", "--ray")
    assert "no HOST:PORT" in error_of(*words, "somewhere")
    assert "--nproc 2" in error_of(*words, "localhost:6379", "--nproc", 2)
    monkeypatch.setitem(sys.modules, "ray", None)
    line = error_of(*words, "localhost:6379")
    assert line.endswith("-m pip install --no-deps --require-hashes -r code/cluster.lock")
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        line = error_of(*words, f"127.0.0.1:{closed.getsockname()[1]}")
    assert "cannot join a Ray cluster there" in line and "refused" in line
    assert not list((tmp_path / "out").iterdir())


def test_the_extra_and_its_lock_name_the_same_ray() -> None:
    extras = tomllib.loads((CODE / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (ray,) = extras["cluster"]
    assert f"\n{ray} \\\n" in (CODE / "cluster.lock").read_text(encoding="utf-8")
