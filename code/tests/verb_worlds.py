"""Inputs of every verb, and the command by which each writes into one folder."""

import shutil
from collections.abc import Callable
from pathlib import Path

import orjson
from worlds import tiny_preset, write_jsonl

from tongkuan.cli.verbs import main


class World:
    """Copies of a data folder and a model, raw files, a preset, and `out`: the folder that verbs write into."""

    def __init__(self, top: Path, data: Path, model: Path) -> None:
        self.top, self.out = top, top / "out"
        self.data, self.raw = shutil.copytree(data, top / "data"), top / "raw"
        self.model, self.preset = Path(shutil.copy(model, top / "model.safetensors")), tiny_preset(top)
        self.submit, self.answers = top / "submit", top / "answers.jsonl"
        for split in ("train", "valid", "test"):
            shutil.copytree(data / "images", self.raw / f"item_{split}_images")
            for kind in ("info", "pair"):
                shutil.copy(data / f"item_{split}_{kind}.jsonl", self.raw)

    def hand_out(self) -> None:
        """What resize leaves for split."""
        shutil.copytree(self.raw, self.out / "handed_out", ignore=shutil.ignore_patterns("*images", "*test*"))

    def judge(self, verb: str, *more: object) -> list[object]:
        """A verb on a result and its answers, which are made first."""
        if not self.answers.exists():
            main([*map(str, (*self.predict(), "--submit", self.submit))])
            rows = map(orjson.loads, (self.data / "item_test_pair.jsonl").read_bytes().splitlines())
            write_jsonl(self.answers, [row | {"item_label": str(number % 2)} for number, row in enumerate(rows)])
        return [verb, "--submit", self.submit, "--pairs", self.answers, *more]

    def predict(self, verb: str = "predict") -> list[object]:
        return [verb, "--data", self.data, "--model", self.model]

    def train(self) -> list[object]:
        return ["train", "--preset", self.preset, "--data", self.data]


WRITERS: dict[str, Callable[[World], list[object]]] = {
    "download": lambda world: ["download", "--from", world.raw, "--raw", world.out],
    "sample": lambda world: ["sample", "--products", 40, "--raw", world.out],
    "resize": lambda world: ["resize", "--raw", world.raw, "--data", world.out],
    "split": lambda world: ["split", "--data", world.out],
    "weights": lambda world: ["weights", "--model", world.model, "--out", world.out / "model"],
    "weights fetched": lambda world: ["weights", "--preset", world.preset, "model.text.weights=hub:some/where"],
    "train": lambda world: [*world.train(), "--run", world.out, "--model", world.out / "model"],
    "train --model": lambda world: [*world.train(), "--run", world.top / "run", "--model", world.out / "model"],
    "predict": lambda world: [*world.predict(), "--submit", world.out],
    "predict --cache": lambda world: [*world.predict(), "--submit", world.submit, "--cache", world.out],
    "evaluate": lambda world: [*world.predict("evaluate"), "--cache", world.out],
    "plot": lambda world: world.judge("plot", "--out", world.out / "a.svg"),
    "report": lambda world: world.judge("report", "--data", world.data, "--out", world.out / "a.html"),
    "explain": lambda world: [*world.predict("explain"), "--out", world.out / "a.html"],
    "match run": lambda world: ["match", "run", *world.predict()[1:], "--out", world.out],
    "export": lambda world: ["export", "--model", world.model, "--out", world.out / "a.onnx"],
    "demo": lambda world: ["demo", "--run", world.out],
}
