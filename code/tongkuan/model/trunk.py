"""What every model is made of: encoders of texts and pictures, each once or twice."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from tongkuan.ranks.arithmetic import computed_at

# transformers' types of encoders that take a mask of attention as it is used.
READY_MASKS = ("bert", "roberta", "xlm-roberta")
Kind = Literal["text", "image"]


class ItemModel(nn.Module, ABC):
    """Encoders and what joins them: items -> embeddings [p ; q]."""

    @abstractmethod
    def widths(self) -> dict[str, int]:
        """Raw numbers of an item by part, in the order of `raw`."""

    @abstractmethod
    def raw(self, images: Tensor, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """What is known of items before anything is joined, by part: float (N, width); inputs as in Trunk.features."""

    @abstractmethod
    def joined(self, raw: Mapping[str, Tensor], *words: Tensor) -> Tensor:
        """Embeddings [p ; q], float (N, 2 x embedding_size), of what `raw` gives and encode.store.padded_words."""

    def join(self, raw: Mapping[str, Tensor], *words: Tensor) -> Tensor:
        """`joined` at fp32, whatever the encoders are computed at.

        A score is the difference of two products that are near each other: rounding would show, and costs no time here.
        """
        device = (*words, *raw.values())[0].device
        with computed_at("fp32", device):
            return self.joined({name: rows.float() for name, rows in raw.items()}, *words)

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor | None, *words: Tensor) -> Tensor:
        """Embeddings [p ; q], float (N, 2 x embedding_size)."""
        return self.join(self.raw(images, ids, mask), *words)

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

    def states(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """What the text encoder says of each token: float (N, T, H); inputs as in `features`."""
        assert self.text is not None
        if mask is not None and takes_ready_mask(self.text):
            # Of a mask (N, T), transformers would ask the device whether it has a 0, and wait for the answer.
            mask = mask.bool()[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
        states: Tensor = self.text(input_ids=ids, attention_mask=mask).last_hidden_state
        return states

    def features(self, images: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
        """What the encoders say, text first: float (N, width).

        images float (N, 3, S, S) normalised; ids int64 (N, T), and mask likewise, None where no text is padded.
        """
        parts = []
        if self.text is not None:
            parts.append(self.states(ids, mask)[:, 0])  # [CLS] (N, H)
        if self.image is not None:
            parts.append(self.image(images))  # (N, F)
        return torch.cat(parts, dim=1)


def takes_ready_mask(text: nn.Module) -> bool:
    """Whether a text encoder takes a mask bool (N, 1, T, T) for what its attention is to use."""
    config: Any = text.config
    is_plain = config.model_type in READY_MASKS and not config.is_decoder
    return is_plain and config._attn_implementation == "sdpa"


@functools.cache  # copying numbers to a GPU has the host wait for it
def constant(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 (len(numbers),)."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)
