"""Predicting and training as the published entry does, kept plain as the measure of ours: both sides of a pair anew.

Both sides of every pair are decoded, padded to the longest text allowed and sent through both towers, a call a side, in
fp32; each embedding is written with `str(list)`; a training step reads its loss and its accuracy as numbers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn

from tongkuan.model.towers import TwoTowers, pair_logits
from tongkuan.records.attributes import item_text
from tongkuan.records.items import Item, Pair
from tongkuan.records.pictures import read_image
from tongkuan.settings import ModelSettings

BATCH = 4  # pairs

Side = tuple[Tensor, Tensor, Tensor]


def predict(
    model: TwoTowers,
    settings: ModelSettings,
    tokenizer: Tokenizer,
    items: Mapping[str, Item],
    images: Path,
    pairs: Sequence[Pair],
    out: Path,
) -> dict[str, NDArray[np.float32]]:
    """Write a row a pair; returns the embedding [p ; q] (2D,) of each item as it was met last."""
    met, device = {}, next(model.parameters()).device
    with out.open("wb") as file, torch.no_grad():
        for start in range(0, len(pairs), BATCH):
            batch = pairs[start : start + BATCH]
            both = [
                model(*on(device, side_inputs([items[i] for i in side], settings, tokenizer, images))).cpu().numpy()
                for side in ([pair.left for pair in batch], [pair.right for pair in batch])
            ]
            for pair, left, right in zip(batch, *both, strict=True):
                met[pair.left], met[pair.right] = left, right
                row = [pair.left, str(left.tolist()), pair.right, str(right.tolist()), 0.0]
                keys = ("src_item_id", "src_item_emb", "tgt_item_id", "tgt_item_emb", "threshold")
                file.write(orjson.dumps(dict(zip(keys, row, strict=True))) + b"\n")
    return met


SWITCHES = ("fused_attn", "is_folded", "reads_first")
"""Of modules: attention that is not written out, norms folded into convolutions, a last layer of [CLS] alone."""


def as_published(model: TwoTowers) -> TwoTowers:
    """All that is computed written out, and pictures plane by plane, as before fused attention and channels-last."""
    write_out(model, True)
    return model.to(memory_format=torch.contiguous_format)


def write_out(model: TwoTowers, is_published: bool) -> None:
    """Have encoders compute by the published way, or by ours again."""
    for text in model.encoders("text"):
        text.set_attn_implementation("eager" if is_published else "sdpa")  # type: ignore[operator]
    for module in model.modules():
        for switch in SWITCHES:
            if hasattr(module, switch):
                setattr(module, switch, not is_published)


def side_inputs(side: Sequence[Item], settings: ModelSettings, tokenizer: Tokenizer, images: Path) -> Side:
    """(pictures (B, 3, S, S), ids (B, max_tokens), mask (B, max_tokens)) of one side of a batch."""
    pixels = np.stack([read_image(images / item.image_name, settings.image.size) for item in side])
    mean, deviation = (
        torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (settings.image.mean, settings.image.deviation)
    )
    tokenizer.enable_truncation(settings.text.max_tokens)
    tokenizer.enable_padding(length=settings.text.max_tokens)
    encodings = tokenizer.encode_batch([item_text(item) for item in side])
    ids, mask = (torch.tensor([getattr(e, name) for e in encodings]) for name in ("ids", "attention_mask"))
    return (torch.from_numpy(pixels).float() / 255 - mean) / deviation, ids, mask


def on(device: torch.device, side: Side) -> Side:
    """A side on a device, each tensor waited for."""
    pixels, ids, mask = (tensor.to(device) for tensor in side)
    return pixels, ids, mask


def pair_loss(model: TwoTowers, sides: Sequence[Side], labels: Tensor) -> tuple[Tensor, Tensor]:
    """(loss (), logits (B, 2)) of B pairs: a call of the network a side."""
    left, right = (model(*side) for side in sides)
    logits = pair_logits(left, right)
    return nn.functional.cross_entropy(logits, labels), logits


def training_step(
    model: TwoTowers, optimizer: torch.optim.Optimizer, sides: Sequence[Side], labels: Tensor, clip_norm: float
) -> tuple[float, float]:
    """One optimiser step on B pairs: (loss, accuracy) as numbers, so a device would be waited for at each step."""
    loss, logits = pair_loss(model, sides, labels)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return loss.item(), (logits.argmax(dim=1) == labels).float().mean().item()
