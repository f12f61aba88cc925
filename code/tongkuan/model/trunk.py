"""What every model is made of: encoders of texts and pictures, each once or twice."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, Self

import torch
from torch import Tensor, nn

Kind = Literal["text", "image"]


class ItemModel(nn.Module, ABC):
    """Encoders and what joins them: items -> embeddings [p ; q]."""

    @abstractmethod
    def widths(self) -> dict[str, int]:
        """Raw numbers of an item by part, in the order of `raw`."""

    @abstractmethod
    def raw(self, images: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """What is known of items before anything is joined, by part: float (N, width); inputs as in Trunk.features."""

    @abstractmethod
    def joined(self, raw: Mapping[str, Tensor], *words: Tensor) -> Tensor:
        """Embeddings [p ; q], float (N, 2 x embedding_size), of what `raw` gives and encode.store.padded_words."""

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor, *words: Tensor) -> Tensor:
        """Embeddings [p ; q], float (N, 2 x embedding_size)."""
        return self.joined(self.raw(images, ids, mask), *words)

    def train(self, mode: bool = True) -> Self:
        """Training mode, but for batch normalisation and encoders that do not learn.

        Statistics of a few pictures are noise, and would differ with the number of ranks. Dropout keeps an encoder from
        learning by heart; where nothing is learned, it would only blur what the encoder says.
        """
        super().train(mode)
        for encoder in (*self.encoders("text"), *self.encoders("image")):
            if not any(parameter.requires_grad for parameter in encoder.parameters()):
                encoder.eval()
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def encoders(self, kind: Kind) -> list[nn.Module]:
        """The text or image encoders, each once."""
        trunks = [child for child in self.children() if isinstance(child, Trunk)]
        return [found for trunk in trunks if (found := getattr(trunk, kind)) is not None]

    def joining(self) -> list[nn.Parameter]:
        """Parameters that are no encoder's."""
        found = {id(p) for encoder in (*self.encoders("text"), *self.encoders("image")) for p in encoder.parameters()}
        return [p for p in self.parameters() if id(p) not in found]


class Trunk(nn.Module):
    """A text and an image encoder."""

    def __init__(self, text: nn.Module | None, image: nn.Module | None) -> None:
        super().__init__()
        self.text, self.image = text, image

    @property
    def width(self) -> int:
        """Numbers that `features` has of an item."""
        text = self.text.config.hidden_size if self.text else 0  # type: ignore[union-attr]
        return int(text) + int(self.image.num_features if self.image else 0)  # type: ignore[arg-type]

    def features(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """What the encoders say, text first: float (N, width).

        images float (N, 3, S, S) normalised; ids and mask int64 (N, T).
        """
        parts = []
        if self.text is not None:
            parts.append(self.text(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0])  # [CLS] (N, H)
        if self.image is not None:
            parts.append(self.image(images))  # (N, F)
        return torch.cat(parts, dim=1)


@functools.cache  # copying numbers to a GPU has the host wait for it
def constant(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 (len(numbers),)."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)
