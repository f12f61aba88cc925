"""Small random checkpoints as released, under the names that transformers gives."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel, SwinConfig, SwinModel

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] 正 品 杯 子 大 ; , a ##0 ##1 ##2 ##3 ##4 ##5 iphone 14 pro cafe ##s ( ) kg ml"


@dataclass(frozen=True)
class Release:
    """A checkpoint as released, its text encoder's folder, and the networks it was saved from."""

    path: Path
    encoder: Path
    size: int
    swin: dict[str, Any]
    towers: list[tuple[BertModel, SwinModel, nn.Linear]]

    def words(self, out: Path, *more: object) -> list[str]:
        """The verb that imports it."""
        options = ("--model", self.path, "--text-encoder", self.encoder, "--out", out)
        return ["weights", *map(str, options), *map(str, more), f"model.image.size={self.size}", *self.overrides()]

    def overrides(self) -> list[str]:
        arguments = orjson.dumps(self.swin | {"img_size": self.size}).decode()
        return ["model.image.architecture=swin_tiny_patch4_window7_224", f"model.image.arguments={arguments}"]

    def change(self, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
        """Save it again with an edited state."""
        state = torch.load(self.path, weights_only=True)["params"]
        edit(state)
        torch.save({"params": state}, self.path)


def randomise(network: nn.Module, generator: torch.Generator) -> nn.Module:
    """Every parameter random, none zero; transformers starts bias tables at 0 and LayerNorms at 1."""
    with torch.no_grad():
        for name, value in network.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in name.lower() and name.endswith("weight"):
                value.copy_(1 + 0.2 * noise)
            elif value.ndim > 1 and "table" not in name and "embeddings.weight" not in name:
                value.copy_(noise / value[0].numel() ** 0.5)
            else:
                value.copy_(0.5 * noise)
    return network.eval()


def make_release(
    folder: Path, size: int = 32, window: int = 4, depths: Any = (2, 2), heads: Any = (1, 2), width: int = 8
) -> Release:
    """Small random towers, saved under the names of transformers 4.18, to which save_pretrained goes back."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = folder / "encoder"
    words = WORDS.split()
    bert = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=140,
    )
    bert.save_pretrained(encoder)
    (encoder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    swin = {"window_size": window, "depths": list(depths), "num_heads": list(heads), "embed_dim": width}
    generator = torch.Generator().manual_seed(size)
    towers, state = [], {}
    for number in (1, 2):
        networks = {
            "txt_encoder": BertModel(bert, add_pooling_layer=False),
            "img_encoder": SwinModel(SwinConfig(image_size=size, **swin)),
            "fc": nn.Linear(16 + width * 2 ** (len(depths) - 1), 6),
        }
        for name, network in networks.items():
            randomise(network, generator)
            if name == "fc":
                saved = network.state_dict()
            else:
                network.save_pretrained(folder / name)
                saved = load_file(folder / name / "model.safetensors")
            state |= {f"{name}{number}.{key}": value for key, value in saved.items()}
        towers.append(tuple(networks.values()))
    torch.save({"params": state}, folder / "release.pth")
    return Release(folder / "release.pth", encoder, size, swin, towers)


class Payload:
    """Touches a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)
