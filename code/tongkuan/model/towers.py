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
from tongkuan.settings import ModelSettings


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
