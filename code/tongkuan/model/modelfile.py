"""Models and training states on disk: saved whole or not at all, loaded without executing anything in them.

A model is one .safetensors file that holds all that `predict` needs: weights, model settings, text configuration,
tokenizer, threshold. Its metadata is readable: `python -c "import safetensors; …"` shows it.
"""

import math
import shlex
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import orjson
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from tongkuan.base.errors import UserError, clip, missing
from tongkuan.base.files import publish
from tongkuan.model.towers import build
from tongkuan.model.trunk import ItemModel
from tongkuan.model.wrappings import ROOTS
from tongkuan.settings import ModelSettings

FORMAT = "tongkuan-1"
MODEL_KEY = "tongkuan"  # of a model file's metadata
PACKED = (
    b"\x1f\x8b",
    b"\xfd7zXZ",
    b"7z\xbc\xaf",
    b"Rar!",
    b"BZh",
    b"\x28\xb5\x2f\xfd",
)  # gzip, xz, 7z, rar, bzip2, zstd
OURS = "name a file that ./entrypoint.sh train made"
CARD_FIELDS: dict[str, Any] = {
    "format": str,
    "settings": dict,
    "threshold": int | float,
    "facts": dict,
}  # and two that may be None
DTYPES, BYTES = {torch.float32: "F32", torch.int64: "I64"}, {"F32": 4, "I64": 8}  # by safetensors' names


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a model file says of itself."""

    settings: ModelSettings
    threshold: float
    text_config: dict[str, Any] | None
    tokenizer: str | None
    """The fast tokenizer as JSON."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Where it comes from: step, validation figures, training settings."""

    def open_tokenizer(self) -> Tokenizer | None:
        """A tokenizer of its own for each caller, or None for a model without texts."""
        return Tokenizer.from_str(self.tokenizer) if self.tokenizer is not None else None


def save_model(path: Path, model: ItemModel, card: ModelCard) -> None:
    """Publish weights and card. The same weights and card give the same bytes."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    # As safetensors' own writer has them: counters of batch norms, which are int64, go before float32, then by name.
    names = sorted(state, key=lambda name: (state[name].is_floating_point(), name))
    layout = {name: (DTYPES[state[name].dtype], state[name].shape) for name in names}
    write_safetensors(path, card, layout, (state[name].cpu() for name in names))


def stream_model(path: Path, card: ModelCard, shapes: Mapping[str, Sequence[int]], tensors: Iterable[Tensor]) -> None:
    """Publish the bytes that `save_model` would, from float32 tensors that come one at a time, sorted by name."""
    write_safetensors(path, card, {name: ("F32", shapes[name]) for name in sorted(shapes)}, tensors)


def write_safetensors(
    path: Path, card: ModelCard, layout: Mapping[str, tuple[str, Sequence[int]]], tensors: Iterable[Tensor]
) -> None:
    """Publish tensors that come in the order of `layout`, which has the dtype and shape of each.

    safetensors' own writers want all tensors in memory at once, and put a file of their own in the place of the one
    that `publish` brings to the disk; of its format a header and the numbers are all there is
    (https://github.com/huggingface/safetensors#format).
    """
    header_of: dict[str, Any] = {"__metadata__": format_card(card)}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + BYTES[dtype] * math.prod(shape)
        header_of[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    header = orjson.dumps(header_of)
    header += b" " * (-len(header) % 8)
    with publish(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors:
            file.write(tensor.contiguous().numpy())
        if file.tell() != 8 + len(header) + end:
            raise RuntimeError(f"{path}: the tensors do not fill the places that their shapes announce")


def format_card(card: ModelCard) -> dict[str, str]:
    """A file's metadata. One key only: safetensors writes several in hash order."""
    about = {**asdict(card), "format": FORMAT, "settings": card.settings.model_dump(mode="json")}
    return {MODEL_KEY: orjson.dumps(about, option=orjson.OPT_SORT_KEYS).decode()}


def load_model(path: Path) -> tuple[ItemModel, ModelCard]:
    """The model on the CPU, in evaluation mode. UserError when the file is missing, damaged or not ours."""
    if not path.is_file():
        if path.is_dir():
            raise UserError(f"{path}: a folder, no model; {folder_advice(path)}")
        raise missing(path, "no such model; run ./entrypoint.sh train, or name one with --model")
    if advice := packing(path):
        raise UserError(f"{path}: {advice}")
    if (kind := kind_of(path)) in ("archive", "pickle"):
        raise UserError(f"{path}: {torch_file_advice(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = file.keys(), file.metadata() or {}
            if MODEL_KEY not in metadata:
                raise UserError(f"{path}: weights, but not a model of ours; {foreign_advice(path, names)}")
            card = parse_card(path, metadata)
            state = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        what = "damaged" if kind == "safetensors" else "damaged or not a safetensors file"
        raise UserError(f"{path}: {what} ({error}); copy it again or train anew") from error
    try:
        model = build(card.settings, card.text_config, pretrained=False)
    except Exception as error:  # of a configuration that is none, transformers and timm raise all sorts
        reason = clip(str(error).strip().partition("\n")[0], 120)
        raise UserError(f"{path}: no network can be built of what it says of itself ({reason}); {OURS}") from error
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise UserError(f"{path}: weights and settings disagree at {wrong[0]}; this is a model of other settings")
    model.load_state_dict(state)
    model.eval()
    return model, card


def parse_card(path: Path, metadata: Mapping[str, str]) -> ModelCard:
    """The card in a file's metadata; each field of its type, the threshold finite, the tokenizer one that opens."""
    try:
        about = orjson.loads(metadata[MODEL_KEY])
        if isinstance(about, dict) and isinstance(about.get("format"), str) and about["format"] != FORMAT:
            raise UserError(f"{path}: made by another version of Tongkuan; train anew or use that version")
        for name, kind in CARD_FIELDS.items():
            if not isinstance(about[name], kind) or isinstance(about[name], bool):
                raise TypeError(name)
        card = ModelCard(
            ModelSettings.model_validate(about["settings"]),
            float(about["threshold"]),
            about["text_config"],
            about["tokenizer"],
            about["facts"],
        )
        reads_texts = card.settings.has_text
        if (
            not (isinstance(card.text_config, dict) and isinstance(card.tokenizer, str))
            if reads_texts
            else (card.text_config is not None or card.tokenizer is not None)
        ):
            raise TypeError("text_config")
        if not math.isfinite(card.threshold) or about.keys() - CARD_FIELDS - {"text_config", "tokenizer"}:
            raise ValueError("threshold")
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: not a model of ours, or of other settings; {OURS}") from error
    try:
        card.open_tokenizer()
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{path}: its tokenizer is none ({clip(str(error), 120)}); {OURS}") from error
    return card


# ---------------------------------------------------------------------------------------------------------------------
# Files that are not models of ours


def kind_of(path: Path) -> Literal["safetensors", "archive", "pickle", "other"]:
    """What a file's first bytes say it is; archive is what torch.save writes, pickle what it wrote before 1.6."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\x03\x04":
        return "archive"
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and len(start) > 1:
        return "pickle"
    return "safetensors" if start[8:] == b"{" else "other"


def packing(path: Path) -> str:
    """What to do first with a file that only stands for weights or packs them; empty for any other file."""
    with path.open("rb") as file:
        start = file.read(24)
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights themselves; fetch them: git lfs pull"
    is_packed = start.startswith(PACKED)
    if start[:4] == b"PK\x03\x04":
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:  # a damaged one is named by its reader
            is_packed = not any(name.endswith("data.pkl") for name in archive.namelist())
    return "a packed file; unpack it and name the weights in it" if is_packed else ""


def torch_file_advice(path: Path) -> str:
    """What a torch file is, and how to get a model of it."""
    if path.name in ("last.pt", "previous.pt") and (best := path.with_name("best.safetensors")).is_file():
        return f"a state to go on training from, no model; name {shlex.quote(str(best))}, its best model"
    return f"a torch checkpoint, not a model of ours; make one of it: {import_command(path)}"


def import_command(path: Path) -> str:
    """What makes a model file of a checkpoint of the entry."""
    out = path.with_name(f"{path.stem}.model.safetensors")
    return f"./entrypoint.sh weights --model {shlex.quote(str(path))} --out {shlex.quote(str(out))}"


def foreign_advice(path: Path, names: Iterable[str]) -> str:
    """What to do with tensors of another program."""
    if any(ROOTS.match(step) for name in names for step in name.split(".")):
        return f"make one of it: {import_command(path)}"
    place = shlex.quote(f"folder:{path.parent}")
    return f"train with it as an encoder (model.text.weights={place} or model.image.weights=…), or {OURS}"


def folder_advice(path: Path) -> str:
    """Which file of a folder to name."""
    for name in ("model.safetensors", "best.safetensors"):
        if (path / name).is_file():
            return f"name {shlex.quote(str(path / name))}"
    return OURS
