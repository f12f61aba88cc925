"""Swin's attention with windows folded into heads: timm's numbers, of the weights that are there now."""

import copy
import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from timm.layers.config import set_fused_attn
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tongkuan.model import windows
from tongkuan.model.encoders import build_image
from tongkuan.model.windows import FoldedStage, FoldedWindows
from tongkuan.settings import ImageEncoder

SIZES = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
NAME = "swin_tiny_patch4_window7_224"


@pytest.fixture
def both() -> tuple[nn.Module, nn.Module]:
    """timm's network and ours of the same weights, to encode with."""
    torch.manual_seed(0)
    ours = build_image(ImageEncoder(architecture=NAME, size=64, arguments=SIZES), pretrained=False).eval()
    set_fused_attn(True, experimental=True)
    plain = timm.create_model(NAME, num_classes=0, **SIZES).to(memory_format=torch.channels_last).eval()
    plain.load_state_dict(ours.state_dict())
    assert sum(type(module) is FoldedWindows for module in ours.modules()) == 4
    assert sum(type(module) is WindowAttention for module in plain.modules()) == 4
    return plain, ours


def pictures(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, 3, 64, 64, generator=generator).contiguous(memory_format=torch.channels_last)


@contextmanager
def encoding(dtype: torch.dtype) -> Iterator[None]:
    """As encode does it."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3])
def test_the_numbers_are_timms_to_the_bit(both: tuple[nn.Module, nn.Module], count: int, dtype: torch.dtype) -> None:
    plain, ours = both
    with encoding(dtype):
        for _ in range(2):  # with a new table, then with the kept one
            torch.testing.assert_close(ours(pictures(count)), plain(pictures(count)), rtol=0, atol=0)


def test_a_table_follows_its_weights(both: tuple[nn.Module, nn.Module]) -> None:
    plain, ours = both
    with encoding(torch.float32):
        before = ours(pictures(2))
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(ours.train().parameters(), 0.01)
    ours(pictures(2)).square().sum().backward()
    optimizer.step()
    ours.eval()
    plain.load_state_dict(ours.state_dict())
    with encoding(torch.float32):
        after = ours(pictures(2))
        assert not torch.equal(after, before)
        assert torch.equal(after, plain(pictures(2)))
    ours.load_state_dict(copy.deepcopy(plain.state_dict()))
    with torch.no_grad():  # in place, while encoding goes on
        for network in both:
            for name, parameter in network.named_parameters():
                if "bias_table" in name:
                    parameter.mul_(-3)
    with encoding(torch.float32):
        assert torch.equal(ours(pictures(2)), plain(pictures(2)))


def test_each_type_has_its_table(both: tuple[nn.Module, nn.Module]) -> None:
    plain, ours = both
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        with encoding(dtype):
            assert torch.equal(ours(pictures(2)), plain(pictures(2)))
    twin, plain = copy.deepcopy(ours).double(), plain.double()
    with encoding(torch.float32):
        assert torch.equal(twin(pictures(2).double()), plain(pictures(2).double()))


def gradients(network: nn.Module) -> list[Tensor]:
    network.zero_grad()
    network(pictures(2)).square().sum().backward()
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def test_gradients_are_timms(both: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a weight are a sum over pixels, in whatever order they lie."""
    plain, ours = both
    expected = gradients(plain)
    for one, other in zip(gradients(ours), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(FoldedStage, "is_folded", False)
    assert all(torch.equal(one, other) for one, other in zip(gradients(ours), expected, strict=True))


def test_pixels_are_moved_once_a_block(both: tuple[nn.Module, nn.Module]) -> None:
    """Where timm rolls, cuts, puts together and rolls back."""
    moves = []
    for network in both:
        with encoding(torch.float32), Operators() as seen:
            network(pictures(1))
        moves.append((seen.found["aten::roll"], seen.found["aten::index_select"]))
    assert moves == [(2 * 2, 0), (0, 2 * 3)], "of two stages with two blocks each: into windows, shifted, and back"


def test_pixels_that_windows_do_not_cut_evenly_go_timms_way() -> None:
    sizes = SIZES | {"img_size": 72, "always_partition": True}  # 18 pixels a side, then 9, in windows of 4
    ours = build_image(ImageEncoder(architecture=NAME, size=72, arguments=sizes), pretrained=False).eval()
    plain = timm.create_model(NAME, num_classes=0, **sizes).to(memory_format=torch.channels_last).eval()
    plain.load_state_dict(ours.state_dict())
    images = torch.rand(2, 3, 72, 72).contiguous(memory_format=torch.channels_last)
    with encoding(torch.float32):
        assert torch.equal(ours(images), plain(images))


@pytest.mark.parametrize("is_swapped", [False, True])
def test_attention_may_lay_its_result_out_as_it_likes(
    both: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch, is_swapped: bool
) -> None:
    """A GPU's kernel for fp32 has heads after pixels; in `view`, that was an error."""
    plain, ours = both
    attend = windows.scaled_dot_product_attention

    def laid_out(*inputs: Any) -> Tensor:
        found = attend(*inputs)
        return found.transpose(1, 2).contiguous().transpose(1, 2) if is_swapped else found

    monkeypatch.setattr(windows, "scaled_dot_product_attention", laid_out)
    with encoding(torch.float32):
        assert torch.equal(ours(pictures(2)), plain(pictures(2)))


@pytest.mark.slow
def test_compiled_blocks_are_compiled_once(both: tuple[nn.Module, nn.Module]) -> None:
    """A kept table would change what a graph depends on."""
    graphs = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    plain, ours = both
    ours.layers[0].blocks[1].compile(backend=compiler)
    with encoding(torch.float32):
        for _ in range(3):
            assert torch.equal(ours(pictures(2)), plain(pictures(2)))
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_an_export_is_timms(both: tuple[nn.Module, nn.Module]) -> None:
    """With a table in it, a graph would be of as many numbers as windows, heads and pixels have."""
    files = []
    for network in both:
        network(pictures(1))
        with encoding(torch.float32):
            network(pictures(1))
        file = io.BytesIO()
        with torch.no_grad():
            torch.onnx.export(network, (pictures(1),), file, dynamo=False)
        # Not what the exporter calls an operator's input: it counts.
        files.append(re.sub(rb"input\.\d+", b"input", file.getvalue()))
    assert files[0] == files[1]


def test_folded_windows_learn_the_same(both: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """What benchmarks/gpu.py times; the gradient of a table is summed in another order."""
    monkeypatch.setattr(FoldedWindows, "folds", lambda self: True)
    for network in both:
        network(pictures(2)).square().sum().backward()
    for one, other in zip(*(network.parameters() for network in both), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


class Operators(TorchDispatchMode):
    """How often each operator was called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """The most numbers in a tensor of floats that an operator inside has made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() // 4 for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return result


def test_no_table_is_made_for_each_picture() -> None:
    """A table of 4 windows x 2 heads x 64 x 64 numbers; a picture's queries, keys and values are 4 x 64 x 48."""
    found = []
    for kind in (WindowAttention, FoldedWindows):
        attention, mask = kind(dim=16, num_heads=2, window_size=8).eval(), torch.zeros(4, 64, 64)
        with torch.no_grad():
            attention(torch.rand(8 * 4, 64, 16), mask)
            with Largest() as seen:
                attention(torch.rand(8 * 4, 64, 16), mask)
        found.append(seen.numbers)
    assert found == [8 * 4 * 2 * 64 * 64, 8 * 4 * 64 * 48]


def test_what_is_told_not_to_fuse_is_written_out(both: tuple[nn.Module, nn.Module]) -> None:
    for network in both:
        for module in network.modules():
            if isinstance(module, WindowAttention):
                module.fused_attn = False
    plain, ours = both
    with encoding(torch.float32):
        assert torch.equal(ours(pictures(2)), plain(pictures(2)))
    assert all(module.kept is None for module in ours.modules() if isinstance(module, FoldedWindows))
