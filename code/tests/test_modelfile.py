"""Files that are no model of ours, or whose card is not as we write it, are one line; and what it says to do, works."""

import bz2
import gzip
import lzma
import shlex
import shutil
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from release_worlds import Release, make_release
from safetensors import safe_open
from safetensors.torch import save_file
from test_main import error_of
from test_main import predict as predict_words

from tongkuan.base.errors import UserError
from tongkuan.cli.verbs import main
from tongkuan.model.modelfile import load_model, parse_card

HERE = Path("model.safetensors")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return make_release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def about(model: Path) -> dict[str, Any]:
    """What a model file says of itself."""
    with safe_open(model, framework="pt") as file:
        return dict(orjson.loads(file.metadata()["tongkuan"]))


def rewritten(model: Path, out: Path, content: bytes) -> Path:
    """The model with another card."""
    with safe_open(model, framework="pt") as file:
        save_file({name: file.get_tensor(name) for name in file.keys()}, out, {"tongkuan": content.decode()})  # noqa: SIM118
    return out


def one_line(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(path)
    line = str(caught.value)
    assert len(line.splitlines()) == 1 and line.startswith(f"{path}: ") and len(line) < 500
    return line


@pytest.mark.parametrize("content", ["[1]", "null", "3", '"x"', "{}", "{", "", "[" * 500, '{"format": ["tongkuan-1"]}'])
def test_metadata_that_is_no_card_is_one_line(content: str) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors: not a model of ours, or of other settings; name a file"):
        parse_card(HERE, {"tongkuan": content})


@pytest.mark.parametrize(
    "change",
    [
        {"settings": []},
        {"settings": {"inputs": "sound"}},
        {"settings": {"text": 3}},
        {"threshold": "0.5"},
        {"threshold": None},
        {"threshold": True},
        {"text_config": [1]},
        {"text_config": None},
        {"text_config": "bert"},
        {"tokenizer": None},
        {"tokenizer": {"version": "1.0"}},
        {"facts": [1]},
        {"facts": None},
        {"more": 1},
        {"format": None},
    ],
)
def test_a_field_of_another_type_is_one_line(about: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="not a model of ours, or of other settings"):
        parse_card(HERE, {"tongkuan": orjson.dumps(about | change).decode()})


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + 400 * "0"])
def test_a_threshold_that_is_no_number_is_one_line(about: dict[str, Any], number: str) -> None:
    text = orjson.dumps(about | {"threshold": 12345.5}).decode().replace("12345.5", number)
    with pytest.raises(UserError, match="not a model of ours"):
        parse_card(HERE, {"tongkuan": text})


@pytest.mark.parametrize("tokenizer", ["", "{", "[]", "{}", '{"version":"1.0","model":{"type":"Odd"}}', "x" * 5000])
def test_a_tokenizer_that_is_none_is_one_line(about: dict[str, Any], tokenizer: str) -> None:
    with pytest.raises(UserError, match="its tokenizer is none") as caught:
        parse_card(HERE, {"tongkuan": orjson.dumps(about | {"tokenizer": tokenizer}).decode()})
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mine"},
        {"model_type": None},
        {"model_type": ["bert"]},
        {},
        {"model_type": "bert", "hidden_size": "wide"},
        {"model_type": "bert", "hidden_size": 10, "num_attention_heads": 3},
        {"model_type": "bert", "hidden_act": "mine"},
        {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}},
        {"model_type": "bert", "vocab_size": 2**50},
        {"model_type": "bert", "num_hidden_layers": -1},
    ],
)
def test_a_text_encoder_that_cannot_be_built_is_one_line(
    about: dict[str, Any], model: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    path = rewritten(model, tmp_path / "odd.safetensors", orjson.dumps(about | {"text_config": config}))
    assert ("no network can be built" in (line := one_line(path))) or "disagree" in line


@pytest.mark.parametrize("arguments", [{"depths": "x"}, {"mine": 1}, {"dims": [8, 8]}, {"depths": [0, 0, 0, -1]}])
def test_an_image_encoder_that_cannot_be_built_is_one_line(
    about: dict[str, Any], model: Path, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    image = about["settings"]["image"] | {"arguments": arguments}
    changed = about | {"settings": about["settings"] | {"image": image}}
    path = rewritten(model, tmp_path / "odd.safetensors", orjson.dumps(changed))
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert len(str(caught.value).splitlines()) == 1


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(["format", "settings", "threshold", "text_config", "tokenizer", "facts", "x"]), JSON, max_size=3
    ),
    st.booleans(),
    JSON,
)
def test_any_json_is_a_card_or_one_line(about: dict[str, Any], change: Any, is_changed: bool, other: Any) -> None:
    content = orjson.dumps(about | change if is_changed else other)
    try:
        card = parse_card(HERE, {"tongkuan": content.decode()})
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 400
    else:
        assert is_changed and isinstance(card.threshold, float) and isinstance(card.facts, dict)


# ---------------------------------------------------------------------------------------------------------------------
# Files of others


def advised(line: str) -> list[str]:
    """The words after ./entrypoint.sh in a line's last command."""
    return shlex.split(line.rpartition("./entrypoint.sh ")[2])


@pytest.mark.parametrize("form", ["model.pth", "my model.ckpt", "old.bin", "release.safetensors"])
def test_the_advice_for_a_checkpoint_makes_a_model(data: Path, release: Release, tmp_path: Path, form: str) -> None:
    path = tmp_path / form
    state = torch.load(release.path, weights_only=True)["params"]
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=form != "old.bin")
    for verb in (("predict", "--submit", tmp_path / "submit"), ("evaluate",)):
        line = error_of(*verb, "--data", data, "--model", path)
        assert line.startswith(f"{path}: ") and "make one of it: ./entrypoint.sh weights --model " in line
    words = advised(line)
    main([*words, "--text-encoder", str(release.encoder), f"model.image.size={release.size}", *release.overrides()])
    assert main([*map(str, predict_words(data, Path(words[-1]), tmp_path / "submit"))]) == 0


def test_other_weights_and_folders_are_told_apart(data: Path, model: Path, release: Release, tmp_path: Path) -> None:
    save_file({"layers.0.weight": torch.ones(2)}, tmp_path / "timm.safetensors", {"format": "pt"})
    line = one_line(tmp_path / "timm.safetensors")
    assert "weights, but not a model of ours; train with it as an encoder" in line and str(tmp_path) in line
    assert "name a file that ./entrypoint.sh train made" in one_line(release.encoder)
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(model, folder / "model.safetensors")
    line = one_line(folder)
    assert line == f"{folder}: a folder, no model; name {folder / 'model.safetensors'}"
    load_model(Path(line.rpartition("name ")[2]))
    for name in ("last.pt", "previous.pt"):
        line = one_line(model.parent / "run" / name)
        assert "a state to go on training from, no model; name " in line
        load_model(Path(line.partition("; name ")[2].partition(",")[0]))


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"<html>404</html>", b"\x80", b"GIF89a...", b"\x08" + bytes(7) + b"{x}   "]
)
def test_what_is_nothing_known_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model").write_bytes(content)
    assert "copy it again or train anew" in one_line(tmp_path / "model")


@pytest.mark.parametrize("form", ["zip", "gz", "xz", "bz2"])
def test_a_packed_file_is_named_as_such(model: Path, release: Release, tmp_path: Path, form: str) -> None:
    for source in (model, release.path):
        path = tmp_path / f"{source.name}.{form}"
        if form == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.write(source, source.name)
        else:
            path.write_bytes({"gz": gzip, "xz": lzma, "bz2": bz2}[form].compress(source.read_bytes()))
        for words in (
            ("evaluate", "--data", tmp_path, "--model", path),
            replace(release, path=path).words(tmp_path / "m"),
        ):
            assert error_of(*words) == f"{path}: a packed file; unpack it and name the weights in it"
    assert not (tmp_path / "m").exists()


def test_a_pointer_of_git_lfs_is_reported(release: Release, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert one_line(path).endswith("a Git LFS pointer, not the weights themselves; fetch them: git lfs pull")
    assert "git lfs pull" in error_of(*replace(release, path=path).words(tmp_path / "m"))


def test_nothing_in_a_torch_file_is_looked_at_to_say_so(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04" + b"x" * 100)
    with warnings.catch_warnings(action="error"):
        assert "a torch checkpoint, not a model of ours" in one_line(tmp_path / "model.pt")
