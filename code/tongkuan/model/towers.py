"""Two towers and the score (arXiv 2208.11064): q_a.q_b - p_a.p_b, "same" when greater than the threshold.

p is the threshold tower's embedding, q the commodity tower's; p_a.p_b is the pair's self-adaptive threshold.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tongkuan.model.encoders import build_image, build_text
from tongkuan.model.first_token import read_first_token
from tongkuan.model.halves import HalvedNorm
from tongkuan.model.kept import Keeps
from tongkuan.model.one import OneTower
from tongkuan.model.trunk import ItemModel, Trunk, takes_ready_mask
from tongkuan.settings import ModelSettings


class Tower(Trunk):
    """A trunk with a head of its own."""

    def __init__(self, text: nn.Module | None, image: nn.Module | None, embedding_size: int) -> None:
        super().__init__(text, image)
        self.head = nn.Linear(self.width, embedding_size)


class TwoTowers(ItemModel):
    """The threshold and the commodity tower, as published: nothing is shared."""

    def __init__(self, threshold: Tower, commodity: Tower) -> None:
        super().__init__()
        self.threshold, self.commodity = threshold, commodity

    def widths(self) -> dict[str, int]:
        """As in ItemModel: of each tower."""
        return {"threshold": self.threshold.width, "commodity": self.commodity.width}

    def raw(self, images: Tensor, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """As in ItemModel: each tower's features."""
        return {
            "threshold": self.threshold.features(images, ids, mask),
            "commodity": self.commodity.features(images, ids, mask),
        }

    def joined(self, raw: Mapping[str, Tensor], *_words: Tensor) -> Tensor:
        """As in ItemModel; words are not read."""
        return torch.cat([self.threshold.head(raw["threshold"]), self.commodity.head(raw["commodity"])], dim=1)

    def heads(self) -> list[tuple[Trunk, nn.Linear]]:
        """Trunk and head of p, then of q."""
        return [(tower, tower.head) for tower in (self.threshold, self.commodity)]


class SharedTowers(ItemModel):
    """One trunk with a head for p and one for q: half the work of TwoTowers."""

    def __init__(self, trunk: Trunk, embedding_size: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.threshold = nn.Linear(trunk.width, embedding_size)
        self.commodity = nn.Linear(trunk.width, embedding_size)

    def widths(self) -> dict[str, int]:
        """As in ItemModel: of the trunk."""
        return {"trunk": self.trunk.width}

    def raw(self, images: Tensor, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """As in ItemModel: the trunk's features."""
        return {"trunk": self.trunk.features(images, ids, mask)}

    def joined(self, raw: Mapping[str, Tensor], *_words: Tensor) -> Tensor:
        """As in ItemModel; words are not read."""
        return torch.cat([self.threshold(raw["trunk"]), self.commodity(raw["trunk"])], dim=1)

    def heads(self) -> list[tuple[Trunk, nn.Linear]]:
        """Trunk and head of p, then of q."""
        return [(self.trunk, self.threshold), (self.trunk, self.commodity)]


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


def build(settings: ModelSettings, text_config: Mapping[str, Any] | None, pretrained: bool) -> ItemModel:
    """The network of `settings`; `text_config` is the resolved transformers configuration (None without texts).

    With `pretrained`, encoders start from the weights that the settings name, else from the current random state.
    """

    def encoders() -> tuple[nn.Module | None, nn.Module | None]:
        text = build_text(settings.text, text_config, pretrained) if text_config is not None else None
        if text is not None and settings.towers != "one" and takes_ready_mask(text):
            read_first_token(text)
        return text, build_image(settings.image, pretrained) if settings.has_image else None

    if settings.towers == "one":  # reads all tokens
        return OneTower(settings, *encoders())
    if settings.towers == "shared":
        return SharedTowers(Trunk(*encoders()), settings.embedding_size)
    return TwoTowers(*(Tower(*encoders(), settings.embedding_size) for _ in range(2)))


def halve_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round once, and for good, the encoders' weights that autocast would round in every batch: the same numbers.

    What keeps weights of its own making rounds those.
    """
    for trunk in (module for module in model.modules() if isinstance(module, Trunk)):
        for encoder in (trunk.text, trunk.image):
            for module in encoder.modules() if encoder is not None else ():
                if isinstance(module, nn.Linear | nn.Conv2d | HalvedNorm) and not isinstance(module, Keeps):
                    module.to(dtype)


def checkpoint_activations(model: ItemModel) -> None:
    """Keep no inner activations of the encoders for backward; recompute them."""
    for text in model.encoders("text"):
        text.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    for image in model.encoders("image"):
        image.set_grad_checkpointing(True)  # type: ignore[operator]
