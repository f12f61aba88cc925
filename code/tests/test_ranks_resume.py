"""Ranks that share no folder: they begin, resume and end as one, or say which of them is not like the first."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_server import Ended, Server, serving
from test_train import state_bytes
from worlds import make_data, tiny_preset

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as one:
        yield one


class Group:
    """Ranks that train in folders of their own, as on as many hosts."""

    def __init__(self, server: Server, data: Path, folder: Path, world_size: int) -> None:
        self.server, self.data, self.folder, self.world_size = server, data, folder, world_size

    def train(self, name: str, *words: str, die_at: str = "", odd: tuple[str, ...] = ()) -> list[Ended]:
        """Train the run of a name; the last rank with odd words as well. How each rank ended."""
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = str(found.getsockname()[1])
        shared = {"WORLD_SIZE": str(self.world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"DIE_AT": die_at, "TONGKUAN_STUCK_SECONDS": "100"}
        ranks = []
        for rank in range(self.world_size):
            run_dir = self.run_dir(name, rank)
            run_dir.mkdir(parents=True, exist_ok=True)
            given = {
                "--preset": tiny_preset(self.folder),
                "--data": self.data,
                "--run": run_dir,
                "--model": run_dir / "m",
            }
            own = [*words, *(odd if rank == self.world_size - 1 else ())]
            options = [str(word) for option in given.items() for word in option]
            ranks.append((shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, ["train", *options, *own]))
        return self.server.ask(ranks)

    def run_dir(self, name: str, rank: int = 0) -> Path:
        return self.folder / f"host{rank}" / name


def codes(ended: list[Ended]) -> list[int]:
    return [code for code, _ in ended]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_run_without_a_shared_folder_resumes_to_the_bytes_of_an_unbroken_one(
    world_size: int, server: Server, data: Path, tmp_path: Path
) -> None:
    """Of three ranks and more, a sum depends on where in a bucket of DDP's a gradient lies."""
    group, words = Group(server, data, tmp_path, world_size), ("train.pairs=12",)
    assert codes(group.train("whole", *words)) == [0] * world_size
    assert codes(group.train("broken", *words, die_at="4")) == [9] * world_size
    assert codes(group.train("broken", *words)) == [0] * world_size
    whole, broken = group.run_dir("whole"), group.run_dir("broken")
    assert state_bytes(broken) == state_bytes(whole)
    assert (broken / "m").read_bytes() == (whole / "m").read_bytes()
    assert not any((group.run_dir("broken", rank) / "last.pt").exists() for rank in range(1, world_size))


@pytest.mark.parametrize(
    "words",
    [("train.augmentation.drop_text=0.2", "model.text.config.hidden_dropout_prob=0.1"), ("train.accumulate=2",)],
)
def test_dropout_and_parts_resume_as_well(words: tuple[str, ...], server: Server, data: Path, tmp_path: Path) -> None:
    group = Group(server, data, tmp_path, 3)
    words += ("train.pairs=12",)
    assert codes(group.train("whole", *words)) == [0] * 3
    assert codes(group.train("broken", *words, die_at="3")) == [9] * 3
    assert codes(group.train("broken", *words)) == [0] * 3
    assert state_bytes(group.run_dir("broken")) == state_bytes(group.run_dir("whole"))


def test_weights_that_have_no_part_in_an_embedding_are_waited_for_by_no_rank(
    server: Server, data: Path, tmp_path: Path
) -> None:
    """An ERNIE has a pooler, and only a BERT can be had without."""
    group = Group(server, data, tmp_path, 2)
    words = ("model.text.config.model_type=ernie",)
    assert codes(group.train("whole", *words)) == [0, 0]
    assert codes(group.train("broken", *words, die_at="3")) == [9, 9]
    assert codes(group.train("broken", *words)) == [0, 0]
    assert state_bytes(group.run_dir("broken")) == state_bytes(group.run_dir("whole"))


def test_a_state_of_another_rank_than_the_first_counts_for_nothing(server: Server, data: Path, tmp_path: Path) -> None:
    """The folders of two hosts were changed for each other: the run begins anew rather than from two steps at once."""
    group = Group(server, data, tmp_path, 2)
    assert codes(group.train("whole")) == codes(group.train("changed")) == [0, 0]
    changed = group.run_dir("changed")
    changed.rename(tmp_path / "here")
    (tmp_path / "here").rename(group.run_dir("anew", 1))
    assert codes(group.train("anew")) == [0, 0]
    assert state_bytes(group.run_dir("anew")) == state_bytes(group.run_dir("whole"))


def test_a_rank_that_would_learn_something_else_is_named_on_all(server: Server, data: Path, tmp_path: Path) -> None:
    group = Group(server, data, tmp_path, 2)
    more = make_data(tmp_path / "more", num_products=7)
    for odd, told in (
        (("train.learning_rate=0.002", "model.embedding_size=4"), "model.embedding_size, train.learning_rate"),
        (("data.encode_batch=7",), "data.encode_batch"),
        (("--data", str(more)), "items, pairs"),
    ):
        for code, said in group.train("run", odd=odd):
            assert code == 2
            assert said.splitlines()[-1].startswith(f"tongkuan: rank 1 differs from rank 0 in {told}"), said
    assert not (group.run_dir("run") / "last.pt").exists()
    of_the_machine = ("data.workers=1", "data.cache_mb=1")
    assert codes(group.train("run", odd=of_the_machine)) == [0, 0]


def test_what_is_wrong_with_the_state_is_said_on_all(server: Server, data: Path, tmp_path: Path) -> None:
    group = Group(server, data, tmp_path, 2)
    assert codes(group.train("run")) == [0, 0]
    last = group.run_dir("run") / "last.pt"
    for code, said in group.train("run", "train.seed=1"):
        assert code == 2 and f"{last}: a run of other settings (train.seed)" in said.splitlines()[-1]
    for name in ("last.pt", "previous.pt"):
        (group.run_dir("run") / name).write_bytes(b"no checkpoint")
    for code, said in group.train("run"):
        assert code == 2 and "previous.pt: damaged; delete to start the run anew" in said.splitlines()[-1]
