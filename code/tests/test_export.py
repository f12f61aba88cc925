"""export: an ONNX file that says what torch says, whole or not at all; code/examples/serve.py answers without torch."""

import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
import torch
from commands import CODE, environment
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d
from worlds import ONE, read_jsonl, tiny_settings, write_jsonl

from tongkuan.base.errors import FailureError, UserError
from tongkuan.cli.verbs import main
from tongkuan.encode.store import open_store
from tongkuan.export import compare, encoder, write
from tongkuan.export.compare import by_torch
from tongkuan.export.encoder import EXTRA, OnnxEncoder
from tongkuan.learn.train import train
from tongkuan.match.add import open_like
from tongkuan.match.files import Folder
from tongkuan.match.query import Searcher
from tongkuan.match.state import open_state
from tongkuan.match.transaction import read_manifest
from tongkuan.model.colour import SIDE, pooled_in_order
from tongkuan.model.modelfile import load_model
from tongkuan.records.items import Item, item_file, read_items

SERVE = CODE / "examples" / "serve.py"
# Importing torch, or a library that brings it, ends the program.
WITHOUT_TORCH = """
import runpy, sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm", "transformers", "faiss", "pydantic", "scipy"):
            raise ImportError(f"{name} is not to be imported here")
sys.meta_path.insert(0, Refused())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def exported(model: Path, out: Path, *more: object) -> OnnxEncoder:
    """What the verb makes of a model."""
    assert main([*map(str, ("export", "--model", model, "--out", out, *more))]) == 0
    return OnnxEncoder(out)


@pytest.fixture(autouse=True, scope="module")
def brief() -> Iterator[None]:
    """How fast it is takes seconds to tell, in each fixture too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "LONG_ENOUGH", 0.0)
        patch.setattr(compare, "TURNS", 1)
        yield


@pytest.fixture(scope="module")
def onnx(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "model.onnx"
    exported(model, out, "--data", data)
    return out


@pytest.fixture(scope="module")
def catalogue(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("catalogue") / "match"
    main([*map(str, ("match", "run", "--data", data, "--model", model, "--out", out))])
    return out


def serve(model: Path, catalogue: Path, *listings: Any, pictures: Path = CODE) -> "subprocess.CompletedProcess[bytes]":
    """The example, in a process that cannot import torch; what is no bytes goes to it as JSON."""
    lines = b"".join((each if isinstance(each, bytes) else orjson.dumps(each)) + b"\n" for each in listings)
    words = ("--model", model, "--catalogue", catalogue, "--pictures", pictures, "--top", 100)
    command = [sys.executable, "-P", "-c", WITHOUT_TORCH, str(SERVE), *map(str, words)]
    return subprocess.run(command, input=lines, capture_output=True, env=environment(), timeout=120)


def answers(done: "subprocess.CompletedProcess[bytes]") -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr[-2000:]
    return [orjson.loads(line) for line in done.stdout.splitlines()]


def listing_of(row: dict[str, Any]) -> dict[str, Any]:
    return {"title": row["title"], "attributes": row["item_pvs"], "picture": row["item_image_name"]}


# Told apart by their texts, or the fit makes much of the last bits: torch differs from itself then.
APART = (
    "model.text.config={model_type: bert, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 32, max_position_embeddings: 32, initializer_range: 0.5}",
)
TOWERS = {
    "two, text": ("model.inputs=text",),
    "two, image": ("model.inputs=image",),
    "shared": ("model.towers=shared",),
    "one": (*ONE, *APART, "model.parts.views=3"),
    "one, words alone": (*ONE, "model.inputs=text", "model.parts.text=0"),
    "one, colours alone": (*ONE, "model.inputs=image", "model.parts.image=0", "model.image.size=20"),
}


@pytest.mark.parametrize("towers", TOWERS)
def test_any_model_says_the_same_as_with_torch(data: Path, tmp_path: Path, towers: str) -> None:
    path = tmp_path / "model.safetensors"
    train(tiny_settings(tmp_path, "train.steps=1", *TOWERS[towers]), data, tmp_path / "run", path)
    found = exported(path, tmp_path / "model.onnx", "--data", data)
    model, card = load_model(path)
    items = read_items(item_file(data, "test"))
    items |= {"blank": Item("blank", title="杯子 AJ-5909"), "bare": Item("bare", image_name="test-0-0.png")}
    store = open_store(items, data, card.settings, card.open_tokenizer(), 0)
    for ids in ([*items], [*items][-2:], [*items][:1]):
        wanted = by_torch(model, store, store.batch(ids))
        assert np.abs(found.embed(found.feed([items[name] for name in ids], data / "images")) - wanted).max() < 1e-5
    assert found.card.threshold == card.threshold


def test_a_pooled_picture_has_the_bits_that_torch_pools() -> None:
    """A last bit moves a pixel to the next bin of a histogram."""
    for side in (16, SIDE, 33, 50, 160):
        picture = torch.rand(2, 3, side, side)
        assert torch.equal(pooled_in_order(picture), adaptive_avg_pool2d(picture, SIDE))


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(model: Path, onnx: Path, data: Path, tmp_path: Path) -> None:
    words = [*map(str, ("export", "--model", model, "--data", data, "--out", tmp_path / "again.onnx"))]
    code = (
        "from tongkuan.cli.verbs import main; from tongkuan.export import compare; "
        f"compare.TURNS, compare.LONG_ENOUGH = 1, 0.0; main({words})"
    )
    again = {**environment(), "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=again, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "again.onnx").read_bytes() == onnx.read_bytes()
    assert all(str(place).encode() not in onnx.read_bytes() for place in (CODE, tmp_path, Path.home()))


def test_it_prints_parity_and_speed(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported(model, tmp_path / "model.onnx")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("parity: 12 listings, largest difference from torch ") for line in lines)
    assert any(line.startswith("speed on one core, one at a time: onnxruntime ") for line in lines)


def test_what_differs_from_torch_is_not_left(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the file of an export before it touched."""
    (tmp_path / "model.onnx").write_text("from before")
    right = OnnxEncoder.embed
    for wrong in (1e-3, np.nan):
        monkeypatch.setattr(OnnxEncoder, "embed", lambda self, feed, wrong=wrong: right(self, feed) + np.float32(wrong))
        with pytest.raises(FailureError, match="not exported: ONNX Runtime's embedding of listing made-0 differs"):
            exported(model, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "from before"


def test_weights_that_one_file_cannot_hold_lie_beside_it(
    model: Path, onnx: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [*read_items(item_file(data, "test")).values()]
    whole = OnnxEncoder(onnx)
    monkeypatch.setattr(write, "LARGEST", 0)
    found = exported(model, tmp_path / "model.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    feed = found.feed(items, data / "images")
    assert np.array_equal(found.embed(feed), whole.embed(feed))
    monkeypatch.setattr(compare, "LIMIT", 0.0)
    monkeypatch.setattr(OnnxEncoder, "embed", lambda self, feed: np.full((12, 16), np.nan, np.float32))
    with pytest.raises(FailureError):
        exported(model, tmp_path / "model.onnx")
    assert not [*tmp_path.iterdir()], "no weights without a graph"
    monkeypatch.undo()
    exported(model, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == onnx.read_bytes()


def test_without_the_extra_one_line_says_how_to_install_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        UserError, match=f"onnxruntime is not installed; install it: .* -m pip install {' '.join(EXTRA)}$"
    ):
        exported(model, tmp_path / "model.onnx")
    project = tomllib.loads((CODE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["optional-dependencies"]["export"] == [*EXTRA]
    assert all(version(name) == pin for name, _, pin in (package.partition("==") for package in EXTRA))
    assert not [*tmp_path.iterdir()]


def test_a_file_that_is_none_of_ours_is_one_line(onnx: Path, tmp_path: Path) -> None:
    content = onnx.read_bytes()
    wrong = {
        "empty": b"",
        "cut": content[: len(content) // 2],
        "text": b"hello",
        "renamed": content.replace(b"tongkuan-onnx-1", b"tongkuan-onnx-2"),
        "another": content.replace(encoder.CARD_KEY.encode() + b"\x12", b"stranger\x12"),
        "wide": content.replace(b'"max_tokens":24', b'"max_tokens":-4'),
    }
    for name, data in wrong.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(UserError) as caught:
            OnnxEncoder(path)
        assert str(caught.value).startswith(f"{path}: "), name
    with pytest.raises(UserError, match="no such file; make it: "):
        OnnxEncoder(tmp_path / "nowhere")


def test_the_example_finds_the_pairs_of_match_run_without_torch(onnx: Path, data: Path, catalogue: Path) -> None:
    rows = read_jsonl(item_file(data, "test"))
    partners: dict[str, set[str]] = {row["item_id"]: {row["item_id"]} for row in rows}
    for pair in pq.read_table(catalogue / "pairs").to_pylist():
        partners[pair["left"]].add(pair["right"])
        partners[pair["right"]].add(pair["left"])
    assert any(len(each) > 1 for each in partners.values())
    found = answers(serve(onnx, catalogue, *map(listing_of, rows), pictures=data / "images"))
    for row, answer in zip(rows, found, strict=True):
        assert {match["item_id"] for match in answer["matches"]} - {row["item_id"]} == (
            partners[row["item_id"]] - {row["item_id"]}
        )
        scores = [match["score"] for match in answer["matches"]]
        assert scores == sorted(scores, reverse=True)


def test_the_example_knows_what_came_and_went_since_the_run(
    onnx: Path, model: Path, data: Path, catalogue: Path, tmp_path: Path
) -> None:
    grown = shutil.copytree(catalogue, tmp_path / "grown")
    rows = read_jsonl(item_file(data, "test"))
    first, other = rows[0], read_jsonl(item_file(data, "valid"))[0]

    def find_themselves() -> list[bool]:
        found = answers(serve(onnx, grown, *map(listing_of, (first, other)), pictures=data / "images"))
        return [
            row["item_id"] in [match["item_id"] for match in answer["matches"]]
            for row, answer in zip((first, other), found, strict=True)
        ]

    assert find_themselves() == [True, False]
    assert main(["match", "remove", first["item_id"], "--out", str(grown)]) == 0
    assert find_themselves() == [False, False]
    write_jsonl(tmp_path / "new.jsonl", [other, first])
    words = ["--items", tmp_path / "new.jsonl", "--data", data, "--model", model, "--out", grown]
    assert main(["match", "add", *map(str, words)]) == 0
    assert find_themselves() == [True, True]


def test_the_example_says_what_match_query_says(
    onnx: Path, model: Path, data: Path, catalogue: Path, tmp_path: Path
) -> None:
    grown = shutil.copytree(catalogue, tmp_path / "grown")
    new = read_jsonl(item_file(data, "valid"))
    write_jsonl(tmp_path / "new.jsonl", new[1:])
    words = ["--items", tmp_path / "new.jsonl", "--data", data, "--model", model, "--out", grown]
    assert main(["match", "add", *map(str, words)]) == 0
    searcher = Searcher.of(open_state(Folder(grown)))
    for row in [new[0], new[1]]:  # one that it does not have, and one that it has
        write_jsonl(tmp_path / "one.jsonl", [row])
        with open_like(read_manifest(Folder(grown)), tmp_path / "one.jsonl", data, model) as run:
            (embedding,) = run.encode("encode", item_ids=[row["item_id"]]).values()
        hits = {hit.item_id: hit.scaled for hit in searcher.new(embedding, "", 100) if hit.is_match}
        (answer,) = answers(serve(onnx, grown, listing_of(row), pictures=data / "images"))
        assert hits and {match["item_id"]: match["scaled"] for match in answer["matches"]} == pytest.approx(
            hits, abs=1e-4
        )


def test_the_runtime_keeps_no_identifier_of_the_machine(onnx: Path, tmp_path: Path) -> None:
    """ONNX Runtime reports to its makers unless told otherwise, and leaves a number below the user's folder for it."""
    program = (
        "import pathlib, sys; from tongkuan.export.encoder import OnnxEncoder; OnnxEncoder(pathlib.Path(sys.argv[1]))"
    )
    home = {name: str(tmp_path) for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME")}
    subprocess.run([sys.executable, "-P", "-c", program, str(onnx)], env=environment() | home, check=True, timeout=120)
    assert not [*tmp_path.iterdir()]


def test_the_example_serves_an_array_by_the_models_threshold(onnx: Path, data: Path, tmp_path: Path) -> None:
    ours = OnnxEncoder(onnx)
    rows = read_jsonl(item_file(data, "test"))
    embeddings = ours.embed(ours.feed([*read_items(item_file(data, "test")).values()], data / "images"))
    np.save(tmp_path / "all.npy", embeddings)
    [answer] = answers(serve(onnx, tmp_path / "all.npy", listing_of(rows[4]), pictures=data / "images"))
    half = embeddings.shape[1] // 2
    scores = (embeddings * embeddings[4]).astype(np.float64)
    passes = scores[:, half:].sum(axis=1) - scores[:, :half].sum(axis=1) > ours.card.threshold
    assert {int(match["item_id"]) for match in answer["matches"]} == {*np.flatnonzero(passes).tolist()}


def test_hostile_listings_are_one_line_each_and_the_rest_is_answered(
    onnx: Path, data: Path, catalogue: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("1", (10_000, 10_001)).save(tmp_path / "large.png")
    secret = tmp_path.parent / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    wrong: dict[str, Any] = {
        "not JSON": b'{"title": ',
        "a listing is a JSON object": [1],
        "title must be a text": {"title": ["a"]},
        "unknown key": {"titel": "杯子"},
        "nothing to compare": {},
        "nested": {"attributes": {"a": {"b": {"c": {"d": 1}}}}},
        "no such file": {"picture": "../secret.png"},
        "not a picture of a known format": {"picture": "text.jpg"},
        "megapixels": {"picture": "large.png"},
        "longer than 1 MB": {"title": "x" * (3 << 20)},
    }
    done = serve(onnx, catalogue, *wrong.values(), {"title": "杯子"}, pictures=tmp_path)
    assert done.returncode == 2 and not done.stderr
    found = [orjson.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(wrong) + 1 and "matches" in found[-1]
    for number, (words, answer) in enumerate(zip(wrong, found, strict=False), 1):
        if words != "nested":
            assert words in answer["error"], answer
            assert answer["error"].startswith(f"line {number}: ")


def test_a_wrong_catalogue_is_one_line(
    onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "narrow.npy", np.zeros((3, 4), np.float32))
    np.save(tmp_path / "nan.npy", np.full((3, OnnxEncoder(onnx).width), np.nan, np.float32))
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "empty").mkdir()
    program = runpy.run_path(str(SERVE))
    for name in ("narrow.npy", "nan.npy", "pickle.npy", "text.npy", "empty", "nowhere"):
        monkeypatch.setattr(sys, "argv", ["serve.py", "--model", str(onnx), "--catalogue", str(tmp_path / name)])
        assert program["main"]() == 2
        printed = capsys.readouterr()
        assert not printed.out
        [line] = printed.err.splitlines()
        assert line.startswith(f"serve.py: {tmp_path / name}: "), line
