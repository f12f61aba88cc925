"""Two towers and the score (arXiv 2208.11064): q_a.q_b - p_a.p_b, "same" when greater than the threshold.

p is the threshold tower's embedding, q the commodity tower's; p_a.p_b is the pair's self-adaptive threshold.
"""

import importlib.util
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tongkuan.base.errors import UserError, clip, is_out_of_memory
from tongkuan.base.files import alone, part_of, rename
from tongkuan.settings import ImageEncoder, ModelSettings, TextEncoder

TOP = Path(__file__).resolve().parents[3]
WEIGHTS_DIR = TOP / "weights"
# What transformers, timm and torch raise for sizes and names that no network can have.
UNFIT = (TypeError, ValueError, ArithmeticError, AssertionError, LookupError, AttributeError, RuntimeError)
# In the hub's folders beside torch's weights.
OTHER_FRAMEWORKS = ["*.h5", "*.msgpack", "*.onnx", "*.ot", "*.tflite"]


class Tower(nn.Module):
    """Text and picture of N items -> (N, embedding_size)."""

    def __init__(self, text: nn.Module | None, image: nn.Module | None, embedding_size: int) -> None:
        super().__init__()
        self.text, self.image = text, image
        width = (text.config.hidden_size if text else 0) + (image.num_features if image else 0)  # type: ignore[operator, union-attr]
        self.head = nn.Linear(int(width), embedding_size)

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """images float (N, 3, S, S) normalised; ids and mask int64 (N, T). Returns float (N, embedding_size)."""
        return self.head(self.features(images, ids, mask))  # type: ignore[no-any-return]

    def features(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """What the encoders say, text first: float (N, width of the head)."""
        parts = []
        if self.text is not None:
            parts.append(self.text(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0])  # [CLS] (N, H)
        if self.image is not None:
            parts.append(self.image(images))  # (N, F)
        return torch.cat(parts, dim=1)


class TwoTowers(nn.Module):
    """The threshold and the commodity tower, never shared."""

    def __init__(self, threshold: Tower, commodity: Tower) -> None:
        super().__init__()
        self.threshold, self.commodity = threshold, commodity

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings [p ; q], float (N, 2 x embedding_size); inputs as in Tower."""
        return torch.cat([self.threshold(images, ids, mask), self.commodity(images, ids, mask)], dim=1)

    def train(self, mode: bool = True) -> "TwoTowers":
        """Training mode, with batch normalisation at its learned statistics.

        Statistics of a few pictures are noise, and would differ with the number of ranks.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def pair_logits(left: Tensor, right: Tensor) -> Tensor:
    """(p_a.p_b, q_a.q_b) of embeddings (B, 2D): float (B, 2). Cross-entropy over them with class 1 = same."""
    products = left * right
    return products.view(len(products), 2, -1).sum(dim=2)


def pair_scores(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """q_a.q_b - p_a.p_b of embeddings [p ; q] (B, 2D), computed in float64: (B,). Symmetric in its sides."""
    products = left.astype(np.float64) * right.astype(np.float64)
    half = products.shape[1] // 2
    scores: NDArray[np.float64] = products[:, half:].sum(axis=1) - products[:, :half].sum(axis=1)
    return scores


@torch.no_grad()
def whiten_head(head: nn.Linear, features: Tensor, norm: float, floor: float = 0.1) -> None:
    """Set a head so that the embeddings of `features` (N, W) have mean 0, no preferred direction and about `norm`.

    All items start alike to an encoder that was never asked to tell them apart: their common part drowns the
    differences, and an inner product of raw features is in the hundreds. Data-dependent initialisation after
    Krähenbühl et al. (arXiv 1511.06856), by principal components; those below `floor` of the mean variance are noise
    and are not raised further.
    """
    mean, deviation = features.double().mean(dim=0), features.double().std(dim=0).clamp(min=1e-6)
    # Of correlations: text and picture come in scales of their own, and neither may outweigh the other.
    variances, directions = torch.linalg.eigh(torch.cov(((features.double() - mean) / deviation).T))  # ascending
    whitener = directions / variances.clamp(min=floor * float(variances.mean())).sqrt()  # (W, W)
    whitener /= deviation.unsqueeze(1)
    size, width = head.weight.shape
    kept = min(size, width)  # of the components, the ones that vary most
    # Orthonormal, so that inner products of embeddings are those of the whitened features: no text times picture.
    mixing = nn.init.orthogonal_(torch.empty(size, kept, dtype=torch.float64))
    weight = norm / math.sqrt(kept) * mixing @ whitener[:, -kept:].T
    head.weight.copy_(weight)
    head.bias.copy_(-weight @ mean)


def build(settings: ModelSettings, text_config: Mapping[str, Any] | None, pretrained: bool) -> TwoTowers:
    """The network of `settings`; `text_config` is the resolved transformers configuration (None without texts).

    With `pretrained`, encoders start from the weights that the settings name, else from the current random state.
    """
    towers = []
    for _ in range(2):
        text = build_text(settings.text, text_config, pretrained) if text_config is not None else None
        image = build_image(settings.image, pretrained) if settings.inputs != "text" else None
        towers.append(Tower(text, image, settings.embedding_size))
    return TwoTowers(*towers)


def halve_weights(model: TwoTowers, dtype: torch.dtype) -> None:
    """Round once, and for good, the weights that autocast would round in every batch: the same numbers."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)


def checkpoint_activations(model: TwoTowers) -> None:
    """Keep no inner activations of the four encoders for backward; recompute them."""
    for tower in (model.threshold, model.commodity):
        if tower.text is not None:
            tower.text.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        if tower.image is not None:
            tower.image.set_grad_checkpointing(True)  # type: ignore[operator]


# ---------------------------------------------------------------------------------------------------------------------
# Encoders and where their weights come from


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
    with alone(WEIGHTS_DIR):
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


def unfit(setting: str, error: Exception) -> Exception:
    """The error to raise when a library cannot build what a setting asks for."""
    if is_out_of_memory(error):
        return error
    return UserError(f"{setting}: no network can be made of these values ({clip(str(error), 160)}); change them")


def build_image(settings: ImageEncoder, pretrained: bool) -> nn.Module:
    """A timm encoder that pools (num_classes=0)."""
    import timm
    from timm.layers.config import set_fused_attn

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
        state = torch.load(path, map_location="cpu", weights_only=True)
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
