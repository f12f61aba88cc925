"""A last layer that works for [CLS] alone: the whole layer's numbers up to rounding, at less work."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from worlds import tiny_settings

from tongkuan.model.encoders import build_text, text_config_of
from tongkuan.model.first_token import FirstToken, read_first_token
from tongkuan.model.towers import build
from tongkuan.model.trunk import READY_MASKS, Trunk
from tongkuan.settings import TextEncoder

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TOKENS = 40


def both(kind: str = "bert") -> tuple[Trunk, Trunk]:
    """An encoder of all tokens, and one of the first alone, of the same weights."""
    torch.manual_seed(0)
    config = {"model_type": kind, "vocab_size": 30, "initializer_range": 0.2, **SIZES}
    whole = build_text(TextEncoder(), config, pretrained=False).eval()
    first = copy.deepcopy(whole)
    read_first_token(first)
    assert list(first.state_dict()) == list(whole.state_dict())
    return Trunk(whole, None), Trunk(first, None)


def texts() -> tuple[Tensor, Tensor]:
    """(ids, mask), both (3, TOKENS), two of the texts padded."""
    ids = torch.randint(4, 20, (3, TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 7:] = mask[2, 20:] = 0
    return ids, mask


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", READY_MASKS)
def test_the_first_token_is_that_of_the_whole_layer(kind: str, attention: str) -> None:
    ids, mask = texts()
    gradients = []
    for padding in (mask, None):
        found = []
        for trunk in both(kind):
            trunk.text.set_attn_implementation(attention)  # type: ignore[union-attr, operator]
            state = trunk.features(torch.zeros(3, 3, 1, 1), ids, padding)
            state.square().sum().backward()
            found.append(state.detach())
            gradients.append([parameter.grad for parameter in trunk.parameters()])
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
        for one, other in zip(gradients[-1], gradients[-2], strict=True):
            if one is not None or other is not None:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert trunk.states(ids, mask).shape == (3, 1, SIZES["hidden_size"])


def test_the_last_layer_makes_keys_and_values_of_all_and_the_rest_of_one() -> None:
    ids, mask = texts()
    counted = []
    for trunk in both():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            trunk.states(ids, mask)
        counted.append(counter.get_total_flops())
    width, rows = SIZES["hidden_size"], ids.numel()
    # Queries, output, feed-forward; what fused attention does on a CPU is not counted.
    assert counted[0] - counted[1] == (2 * width**2 + 2 * width * SIZES["intermediate_size"]) * 2 * (rows - 3)


def test_a_layer_that_is_recomputed_gives_the_same_gradients() -> None:
    _, plain = both()
    again = copy.deepcopy(plain)
    again.text.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[union-attr, operator]
    for trunk in (plain, again):
        trunk.train()
        torch.manual_seed(3)  # of dropout
        trunk.states(*texts()).square().sum().backward()
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("towers", ["two", "shared", "one"])
def test_who_reads_the_first_token_has_no_other(tmp_path: Path, towers: str) -> None:
    settings = tiny_settings(tmp_path, f"model.towers={towers}", "model.embedding_size=512").model
    model = build(settings, text_config_of(settings.text, 30), pretrained=True).eval()

    def of_the_first(text: nn.Module) -> int:
        return sum(isinstance(module, FirstToken) for module in text.modules())

    expected = 0 if towers == "one" else 1  # one tower also reads the mean of all tokens
    assert [of_the_first(text) for text in model.encoders("text")] == [expected] * (2 if towers == "two" else 1)
