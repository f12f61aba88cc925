"""Import a released checkpoint of the entry (arXiv 2208.11064) into a model file of ours, or fetch encoders ahead.

`./entrypoint.sh weights --model weights/63_grad_clip_norm_0.5_net_64000.pth --out weights/model.safetensors`
"""

import math
import pickle
import re
import shlex
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import orjson
import torch
from safetensors import SafetensorError, safe_open
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from tongkuan.base.errors import UserError, entrypoint, missing
from tongkuan.base.files import READ_BLOCK, check_target, sha256_of, temporary_file
from tongkuan.model.encoders import WEIGHTS_DIR, build_image, build_tokenizer, download, fetch, locate, text_config_of
from tongkuan.model.modelfile import MODEL_KEY, ModelCard, kind_of, packing, stream_model
from tongkuan.model.towers import TwoTowers, build
from tongkuan.model.wrappings import unwrap
from tongkuan.presets import load_settings
from tongkuan.settings import ModelSettings, TextEncoder

PARTS = tuple(f".part{a}{b}" for a, b in product(ascii_lowercase, repeat=2))
TOWERS = {"threshold": "1", "commodity": "2"}
ADVICE = "fetch the released file again, with all its parts"
# Computed from the sizes, or of no use to [CLS]; some savers keep them.
IGNORED = re.compile(
    r"relative_position_index$|attn_mask$|embeddings\.(position|token_type)_ids$|^txt_.*pooler\.dense\."
)
# timm's Swin -> transformers' of 4.18 (numbers agree: same LayerNorm eps, exact GELU, order of merged quarters).
IMAGE_NAMES = (
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^patch_embed\.norm", "embeddings.norm"),
    (r"^layers", "encoder.layers"),
    (r"norm1\b", "layernorm_before"),
    (r"norm2\b", "layernorm_after"),
    (r"attn\.proj", "attention.output.dense"),
    (r"attn\.", "attention.self."),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
    (r"^norm\b", "layernorm"),
)


def import_release(
    checkpoint: Path,
    out: Path,
    preset: str,
    overrides: Sequence[str] = (),
    text_encoder: Path | None = None,
    threshold: float = 0.0,
) -> None:
    """Write `out` from a released checkpoint; nothing is written when a key is missing, unexpected or mis-shaped."""
    check_target(out)
    with whole_file(checkpoint, out) as path:
        params, note = read_params(path, checkpoint)
        settings = recipe(params, preset, overrides)
        text_config, tokenizer = text_parts(settings.text, text_encoder, params)
        with torch.device("meta"):  # shapes without numbers
            model = build(settings, text_config, pretrained=False)
        if not isinstance(model, TwoTowers):
            raise UserError(f"{checkpoint}: a released checkpoint has two towers; set model.towers=two")
        check_maps(model, settings.image.size)
        origins = {name: released_names(name) for name in model.state_dict()}
        check_keys(params, origins, model, checkpoint)
        del params
        facts = {"released_sha256": sha256_of(path), "preset": Path(preset).stem}
        card = ModelCard(settings, threshold, text_config, tokenizer, facts)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        stream_model(out, card, shapes, read_in_order(path, checkpoint, origins))
    if note:
        print(note)
    print(f"{out}: {len(shapes)} tensors of {checkpoint.name}, threshold {threshold:.6g}")
    print(f"next: {entrypoint('predict', '--data', 'data', '--split', 'test', '--model', out)}")


# ---------------------------------------------------------------------------------------------------------------------
# The released file


@contextmanager
def whole_file(checkpoint: Path, out: Path) -> Iterator[Path]:
    """The checkpoint as one file: itself, or its parts .partaa, .partab … joined in a temporary file beside `out`."""
    if checkpoint.is_dir():
        raise UserError(f"{checkpoint}: a folder; name the checkpoint's file in it")
    base = checkpoint.with_name(re.sub(r"\.part[a-z]{2}$", "", checkpoint.name))
    if base == checkpoint and checkpoint.is_file():
        yield checkpoint
        return
    parts = sorted(
        path for path in base.parent.glob("*") if re.fullmatch(re.escape(base.name) + r"\.part\w+", path.name)
    )
    if not parts:
        raise missing(checkpoint, f"no such file, nor parts {base.name}.partaa…; name the released checkpoint")
    for part, suffix in zip(parts, PARTS, strict=False):
        if part.name != base.name + suffix:
            raise UserError(f"{base}{suffix}: this part is missing, {part.name} is there; fetch it too")
    with temporary_file(out.with_name(f"{out.name}.joined")) as joined:  # never the name that `out` is written under
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, joined, READ_BLOCK)
        joined.flush()
        yield Path(joined.name)


def read_params(path: Path, shown: Path) -> tuple[dict[str, Tensor], str]:
    """(tensors by released key, mapped from the file rather than read, a note or nothing). Nothing is executed."""
    params, note = unwrap(read_content(path, shown), shown)
    return {key: value.detach() for key, value in params.items() if not IGNORED.search(key)}, note


def read_content(path: Path, shown: Path) -> object:
    """What a torch file or a safetensors file holds, tensors mapped from it."""
    try:
        if advice := packing(path):
            raise UserError(f"{shown}: {advice}")
        kind = kind_of(path)
        if kind == "safetensors":
            quoted = shlex.quote(str(shown))
            with safe_open(path, framework="pt") as file:
                if MODEL_KEY in (file.metadata() or {}):
                    raise UserError(
                        f"{shown}: a model of ours already; ./entrypoint.sh predict --model {quoted} takes it"
                    )
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        with warnings.catch_warnings(action="ignore"):  # of other pickle protocols; the error says enough
            # Files of before torch 1.6 are no archives, and cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "archive")
    except pickle.UnpicklingError as error:
        what = "damaged, or holds more than tensors, which could run code (none of it was run)"
        again = "or save its state dict alone: torch.save(model.state_dict(), FILE)"
        raise UserError(f"{shown}: {what}; {ADVICE}, {again}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{shown}: not a whole torch file ({first_line(error)}); {ADVICE}") from error


def first_line(error: BaseException | None) -> str:
    """What an error of a library says, short enough for our one line."""
    return str(error).strip().partition("\n")[0][:120] or type(error).__name__


def released_names(name: str) -> list[str]:
    """Released keys whose tensors, one above the other, are our tensor `name`."""
    tower, part, inner = name.split(".", maxsplit=2)
    number = TOWERS[tower]
    if part == "head":
        return [f"fc{number}.{inner}"]
    if part == "text":
        return [f"txt_encoder{number}.{inner}"]
    # transformers merges quarters at the end of a stage, timm at the start of the next.
    inner = re.sub(r"^layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", inner)
    for pattern, replacement in IMAGE_NAMES:
        inner = re.sub(pattern, replacement, inner)
    rows = ("query", "key", "value") if ".qkv." in inner else ("qkv",)
    return [f"img_encoder{number}.{inner.replace('qkv', row)}" for row in rows]


def read_in_order(path: Path, shown: Path, origins: Mapping[str, Sequence[str]]) -> Iterator[Tensor]:
    """Our tensors as float32, sorted by name. Only one tower's part of the file is mapped at a time."""
    for _, names in groupby(sorted(origins), key=lambda name: name.partition(".")[0]):
        params, _ = read_params(path, shown)  # mapped anew, so that the pages of the tower before are given back
        for name in names:
            rows = [params[key].float() for key in origins[name]]
            yield rows[0] if len(rows) == 1 else torch.cat(rows)


def check_keys(
    params: Mapping[str, Tensor], origins: Mapping[str, Sequence[str]], model: TwoTowers, shown: Path
) -> None:
    """Raise UserError that counts and names keys that are missing, unexpected or of another shape."""
    wanted = {}
    for name, value in model.state_dict().items():
        for key in origins[name]:
            wanted[key] = (value.shape[0] // len(origins[name]), *value.shape[1:])
    problems = {
        "missing": [key for key in wanted if key not in params],
        "unexpected": sorted(params.keys() - wanted.keys()),
        "of another shape": [
            f"{key} {tuple(params[key].shape)} instead of {shape}"
            for key, shape in wanted.items()
            if key in params and params[key].shape != shape
        ],
    }
    problems["of no plain numbers"] = [
        f"{key} {params[key].dtype}" for key in wanted if key in params and not is_plain(params[key])
    ]
    wrong = [
        f"{len(keys)} {problem} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
        for problem, keys in problems.items()
        if keys
    ]
    if wrong:
        advice = "name the recipe's encoders with --preset, --text-encoder and model.image.architecture=…"
        raise UserError(f"{shown}: keys {'; '.join(wrong)}; not imported; {advice}")


def is_plain(value: Tensor) -> bool:
    """Whether a tensor is floating-point numbers, all there: not quantised, sparse or without contents."""
    return value.is_floating_point() and value.layout == torch.strided and value.device.type == "cpu"


# ---------------------------------------------------------------------------------------------------------------------
# The recipe


def recipe(params: Mapping[str, Tensor], preset: str, overrides: Sequence[str]) -> ModelSettings:
    """Model settings: the preset's with `overrides`, and what only the checkpoint's shapes tell."""
    fixed = ["model.attributes=published", *overrides, "model.inputs=both"]
    if (head := params.get("fc1.weight")) is not None and head.ndim == 2:
        fixed.append(f"model.embedding_size={head.shape[0]}")
    image = load_settings(preset, fixed).model.image
    arguments = {**image.arguments}
    with torch.device("meta"):
        named = build_image(image, pretrained=False)
    if not isinstance(named, SwinTransformer):
        raise UserError(f"model.image.architecture {image.architecture}: a released checkpoint holds Swin; name that")
    sizes = swin_sizes(params)
    # Of another width than the recipe's network: of another size altogether. Of its width, the recipe's word
    # stands, so that a checkpoint that lacks a block is not taken for a smaller one.
    if sizes and "embed_dim" not in arguments and sizes["embed_dim"] != named.embed_dim:
        arguments = {**sizes, **arguments}
    size = arguments.get("img_size", image.size)
    if named.patch_embed.img_size != (size, size):
        arguments["img_size"] = size
    fixed += [f"model.image.arguments={orjson.dumps(arguments).decode()}", f"model.image.size={size}"]
    return load_settings(preset, fixed).model


def swin_sizes(params: Mapping[str, Tensor]) -> dict[str, Any]:
    """timm's arguments for the Swin of the threshold tower, read off its shapes; empty when keys are missing."""
    depths: dict[int, int] = {}
    tables: dict[int, Tensor] = {}  # ((2W - 1)^2, heads)
    for key, value in params.items():
        if found := re.match(r"img_encoder1\.encoder\.layers\.(\d+)\.blocks\.(\d+)\.", key):
            stage, block = int(found[1]), int(found[2])
            depths[stage] = max(depths.get(stage, 0), block + 1)
            if key.endswith("relative_position_bias_table") and value.ndim == 2:
                tables[stage] = value
    patches = params.get("img_encoder1.embeddings.patch_embeddings.projection.weight")  # (C, 3, P, P)
    stages = range(len(depths))
    if patches is None or patches.ndim != 4 or not stages or set(stages) != tables.keys():
        return {}
    return {
        "patch_size": patches.shape[2],
        "embed_dim": patches.shape[0],
        "depths": [depths[stage] for stage in stages],
        "num_heads": [tables[stage].shape[1] for stage in stages],
        "window_size": (math.isqrt(tables[0].shape[0]) + 1) // 2,
    }


def check_maps(model: TwoTowers, size: int) -> None:
    """Raise UserError where timm and transformers would not compute the same from pictures of `size` pixels.

    On a map that is no multiple of its window, timm shifts and then pads, transformers pads and then shifts: the same
    only when half a window is padded. On a map smaller than the window transformers fails, timm shrinks the window.
    """
    encoder: Any = model.threshold.image
    patch, stages = encoder.patch_embed.patch_size[0], list(encoder.layers)
    window = max(stage.blocks[0].window_size[0] for stage in stages)
    side = size // patch
    for stage in stages:
        shifts = any(any(block.shift_size) for block in stage.blocks)
        if size % patch or side < window or (shifts and 2 * (-side % window) not in (0, window)):
            raise UserError(
                f"model.image.size {size}: makes a map of {side} x {side}, which windows of {window} do not tile; "
                "set it to what the checkpoint was trained on"
            )
        side = (side + 1) // 2


def text_parts(settings: TextEncoder, folder: Path | None, params: Mapping[str, Tensor]) -> tuple[dict[str, Any], str]:
    """(transformers configuration, tokenizer as JSON) of the text encoder in `folder`, else of the one named.

    A checkpoint tells neither the words nor the number of heads.
    """
    kind, place = ("folder", str(folder)) if folder is not None else locate(settings.weights)
    if kind == "random":
        raise UserError("model.text.weights random: a checkpoint does not hold the words; name a --text-encoder DIR")
    local = WEIGHTS_DIR / place.rpartition("/")[2] if kind == "hub" else Path(place)
    name = settings.weights.partition(":")[2] or "the text encoder"
    advice = f"put config.json and vocab.txt of {name} into {local}, or name their folder by --text-encoder"
    try:
        if kind == "hub":
            local = download(place, allow_patterns=["*.json", "vocab.txt"])
        for files in (("config.json",), ("vocab.txt", "tokenizer.json")):
            if not any((local / file).is_file() for file in files):
                raise UserError(f"no {files[0]} there")
        # Beside `random`, the settings' fields describe a network from nothing, not this one.
        fields = {} if settings.weights == "random" else settings.config
        found = settings.model_copy(update={"weights": f"folder:{local}", "config": fields})
        config, tokenizer = text_config_of(found, 0), build_tokenizer(found, [])
    except UserError as error:
        raise UserError(f"encoder {place}: {first_line(error.__cause__ or error)}; {advice}") from error
    for table, count in (("word", tokenizer.get_vocab_size()), ("position", settings.max_tokens)):
        rows = params.get(f"txt_encoder1.embeddings.{table}_embeddings.weight")
        if rows is not None and len(rows) < count:
            raise UserError(f"{place}: {count} {table}s, the checkpoint has {len(rows)}; name another --text-encoder")
    return config, tokenizer.to_str()


# ---------------------------------------------------------------------------------------------------------------------
# Encoders for an offline run


def fetch_encoders(preset: str, overrides: Sequence[str] = ()) -> None:
    """Put the encoders that a preset takes from the hub into weights/; those there already stay as they are."""
    settings = load_settings(preset, overrides).model
    for weights in (settings.text.weights, settings.image.weights):
        kind, place = locate(weights)
        if kind == "hub":
            print(f"{weights}: fetching", flush=True)
            print(f"{weights}: now in {fetch(place)}")
        else:
            print(f"{weights}: {f'present in {place}' if place else 'nothing to fetch'}")
    print(f"next: {entrypoint('train', '--preset', preset)}")
