"""Encoders: where their weights come from (hub, folder, package or nothing), their networks and tokenizers."""

import importlib.util
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from tongkuan import TOP
from tongkuan.base.errors import UserError, clip, is_out_of_memory
from tongkuan.base.files import part_of, rename, sole_process
from tongkuan.settings import ImageEncoder, TextEncoder

WEIGHTS_DIR = TOP / "weights"
# What transformers, timm and torch raise for sizes and names that no network can have.
UNFIT = (TypeError, ValueError, ArithmeticError, AssertionError, LookupError, AttributeError, RuntimeError)
# In the hub's folders beside torch's weights.
OTHER_FRAMEWORKS = ["*.h5", "*.msgpack", "*.onnx", "*.ot", "*.tflite"]


def locate(weights: str) -> tuple[str, str]:
    """(kind, place) of `hub:NAME`, `folder:PATH`, `package:NAME/PATH` or `random`.

    A package is looked up without running it. A hub name is a folder of that name in weights/ when there is one.
    """
    kind, _, place = weights.partition(":")
    if kind == "random":
        return kind, ""
    if kind == "package" and place:
        name, _, inside = place.partition("/")
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"{weights}: the Python package {name} is not installed; install code/requirements.lock")
        return "folder", str(Path(spec.submodule_search_locations[0]) / inside)
    if kind == "folder" and place:
        if not Path(place).exists():
            raise UserError(f"{weights}: no such file or folder; fetch the encoder and put it there")
        return kind, place
    if kind == "hub" and place:
        local = WEIGHTS_DIR / place.rpartition("/")[2]
        return ("folder", str(local)) if local.exists() else (kind, place)
    raise UserError(f"{clip(weights)}: weights are hub:NAME, folder:PATH, package:NAME/PATH or random")


def fetch(name: str) -> Path:
    """Bring a hub's encoder into weights/, whole or not at all: its folder. UserError when the hub does not give it."""
    local = WEIGHTS_DIR / name.rpartition("/")[2]
    partial = part_of(local)  # stays after an error: the same command resumes
    with sole_process(WEIGHTS_DIR):
        download(name, local_dir=partial, ignore_patterns=OTHER_FRAMEWORKS)
        shutil.rmtree(partial / ".cache", ignore_errors=True)
        rename(partial, local)
    return local


def download(name: str, **options: Any) -> Path:
    """The folder with files of a hub's encoder, `options` as in snapshot_download; UserError when there is none."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, **options))
    except Exception as error:  # among others those of the HTTP library that the hub's client happens to use
        raise unreachable(name, error) from error


def unreachable(name: str, error: Exception) -> UserError:
    """The one line for an encoder that neither weights/ nor the hub has."""
    local = WEIGHTS_DIR / name.rpartition("/")[2]
    reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
    return UserError(
        f"encoder {name}: not in {local} and not to be had from the hub ({reason}); download it to {local}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Text


def text_config_of(settings: TextEncoder, vocabulary_size: int) -> dict[str, Any]:
    """The resolved transformers configuration: the encoder's own, or sizes from the settings for a random one."""
    from transformers import AutoConfig

    kind, place = locate(settings.weights)
    fields: dict[str, Any] = dict(settings.config)
    try:
        if kind == "random":
            config = AutoConfig.for_model(**{"vocab_size": vocabulary_size, **fields})
        else:
            # Said outright, or transformers asks at the terminal whether to run the folder's code.
            fields = {k: v for k, v in fields.items() if k != "model_type"}
            config = AutoConfig.from_pretrained(place, trust_remote_code=False, **fields)
    except Exception as error:  # a stranger's config.json raises all sorts
        raise unreachable(place or settings.weights, error) from error
    resolved: dict[str, Any] = config.to_diff_dict()
    # Where it was loaded from and by what version is not part of the network.
    return {k: v for k, v in resolved.items() if k not in ("_name_or_path", "transformers_version", "dtype")}


def build_text(settings: TextEncoder, config: Mapping[str, Any], pretrained: bool) -> nn.Module:
    """A transformers encoder without pooler."""
    from transformers import AutoConfig, AutoModel, logging

    kind, place = locate(settings.weights) if pretrained else ("random", "")
    # Its report of unused pooler weights and its own bars would stand among ours.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    without_pooler = {"add_pooling_layer": False} if config.get("model_type") in ("bert", "roberta") else {}
    try:
        resolved = AutoConfig.for_model(**config)
        if kind == "random":
            return AutoModel.from_config(resolved, trust_remote_code=False, **without_pooler)  # type: ignore[no-any-return]
    except UNFIT as error:
        raise unfit("model.text.config", error) from error
    try:
        return AutoModel.from_pretrained(place, config=resolved, trust_remote_code=False, **without_pooler)  # type: ignore[no-any-return]
    except Exception as error:  # a stranger's weights raise all sorts; a pickle that would run code is refused unrun
        raise unreachable(place, error) from error


def build_tokenizer(settings: TextEncoder, texts: Iterable[str]) -> Tokenizer:
    """The encoder's own fast tokenizer; for a random encoder, characters of the training texts."""
    kind, place = locate(settings.weights)
    if kind == "random":
        return character_tokenizer(texts)
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False).backend_tokenizer
    except Exception as error:  # as in model.build_text
        raise unreachable(place, error) from error
    return tokenizer


def character_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """One token a character, the most frequent first: for a text encoder that starts from nothing."""
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    counts = Counter(character for text in texts for character in normalizer.normalize_str(text))
    ordered = sorted(counts, key=lambda character: (-counts[character], character))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *ordered]
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def build_image(settings: ImageEncoder, pretrained: bool) -> nn.Module:
    """A timm encoder that pools (num_classes=0)."""
    import timm
    from timm.layers.config import set_fused_attn

    from tongkuan.model.norms import fold_norms
    from tongkuan.model.windows import fold_windows

    # Swin's attention, too, without its table of scores in memory: timm takes that for an experiment.
    set_fused_attn(True, experimental=True)
    kind, place = locate(settings.weights) if pretrained else ("random", "")
    if not timm.is_model(settings.architecture):
        raise UserError(f"model.image.architecture {clip(settings.architecture)}: timm has no such network")
    source: dict[str, Any] = (
        {"pretrained": True, "pretrained_cfg_overlay": {"hf_hub_id": place}} if kind == "hub" else {}
    )
    try:
        encoder: nn.Module = timm.create_model(settings.architecture, num_classes=0, **source, **settings.arguments)
    except (OSError, *UNFIT) as error:
        if kind == "random" or isinstance(error, TypeError):
            raise unfit(f"model.image.arguments of {settings.architecture}", error) from error
        raise unreachable(place, error) from error
    if kind == "folder":
        load_in_order(encoder, read_tensors(Path(place)), place)
    fold_windows(encoder)
    fold_norms(encoder, settings.size)
    return encoder.to(memory_format=torch.channels_last)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors, .pth or .bin file, or of a folder holding one; nothing in it is executed."""
    if path.is_dir():
        files = [file for suffix in (".safetensors", ".pth", ".bin") for file in sorted(path.glob(f"*{suffix}"))]
        if not files:
            raise UserError(f"{path}: no .safetensors, .pth or .bin file; put the encoder's weights there")
        path = files[0]
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # Mapped, they are copied once, into the encoder; files of before torch 1.6 are no archives and cannot be.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return {key: value for key, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:  # damaged files raise all sorts
        what = "damaged, or holds more than tensors, which could run code (none of it was run)"
        raise UserError(f"{path}: {what}; fetch the encoder's weights again") from error


def load_in_order(encoder: nn.Module, tensors: Mapping[str, Tensor], place: str) -> None:
    """Load by name, or by position when no name agrees: other ports keep the order of layers, not their names."""
    own = encoder.state_dict()
    if not own.keys() & tensors.keys():
        tensors = dict(zip(own, tensors.values(), strict=False))
    wrong = [key for key, value in own.items() if key not in tensors or tensors[key].shape != value.shape]
    if wrong:
        raise UserError(f"{place}: {len(wrong)} tensors are missing or of another shape, first {wrong[0]}; wrong file?")
    encoder.load_state_dict({key: tensors[key] for key in own})


def unfit(setting: str, error: Exception) -> Exception:
    """The error to raise when a library cannot build what a setting asks for."""
    if is_out_of_memory(error):
        return error
    return UserError(f"{setting}: no network can be made of these values ({clip(str(error), 160)}); change them")
