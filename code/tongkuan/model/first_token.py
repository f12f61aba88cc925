"""The last layer of a text encoder for [CLS] alone, where no other token's state is read: published towers, and shared.

Keys and values are made of all tokens. Ten of twelve parts of the layer's products, queries, output and feed-forward,
are then of one token. In encoding and in learning, the numbers are those of the whole layer up to rounding.
"""

import importlib
from typing import Any

from torch import Tensor, nn


class FirstToken(nn.Module):
    """Attention of transformers' BERT and its like, of the first token to all."""

    reads_first = True

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, Any]:
        """States float (N, T, H) and mask (N, 1, T, T) or None -> states of the first token, (N, 1, H)."""
        asked, mask = hidden_states, attention_mask
        if self.reads_first:
            asked, mask = asked[:, :1], None if mask is None else mask[:, :, :1]
        parts: Any = self
        found, weights = parts.self(asked, encoder_hidden_states=hidden_states, attention_mask=mask)
        return parts.output(found, asked), weights


def read_first_token(text: nn.Module) -> None:
    """Have an encoder's last layer, and so its last_hidden_state, be of the first token alone: float (N, 1, H)."""
    attention: Any = text.encoder.layer[-1].attention  # type: ignore[union-attr, index]
    kind, cross = type(attention), type(attention.self).__name__.replace("SelfAttention", "CrossAttention")
    # transformers' own: the same weights, with queries of one tensor and keys and values of another.
    attention.self.__class__ = getattr(importlib.import_module(kind.__module__), cross)
    attention.__class__ = type(f"FirstToken{kind.__name__}", (FirstToken, kind), {})
