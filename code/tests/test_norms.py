"""Batch norms folded into convolutions: the same numbers up to rounding, of the weights that are there now."""

import copy
import io
from typing import Any

import pytest
import timm
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from tongkuan.encode.encode import autocast, prepare
from tongkuan.model.encoders import build_image
from tongkuan.model.norms import CONVOLUTIONS, FoldedConv, FoldedNorm, FoldedSame, fold_norms
from tongkuan.model.towers import SharedTowers
from tongkuan.model.trunk import Trunk
from tongkuan.settings import ImageEncoder

CPU = torch.device("cpu")
# timm's norms with activations and padding by the picture's size; torch's norms; attention over channels between.
ENCODERS: dict[str, dict[str, Any]] = {
    "tf_efficientnet_lite0": {},
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)},
    "mobilenetv3_small_050": {},
}


def drawn(encoder: nn.Module) -> nn.Module:
    """With statistics and weights of norms that are not those of a new network: folding these would show nothing."""
    torch.manual_seed(1)
    for norm in encoder.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.3)
    return encoder.eval()


def both(name: str) -> tuple[nn.Module, nn.Module]:
    """timm's network and ours of the same weights."""
    arguments = ENCODERS[name]
    torch.manual_seed(0)
    ours = build_image(ImageEncoder(architecture=name, size=64, arguments=arguments), pretrained=False)
    plain = timm.create_model(name, num_classes=0, **arguments).to(memory_format=torch.channels_last)
    plain.load_state_dict(drawn(ours).state_dict())
    return plain.eval(), ours


def pictures(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 64, 64, generator=generator).contiguous(memory_format=torch.channels_last)


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


@pytest.mark.parametrize("name", ENCODERS)
def test_every_norm_is_folded_and_the_numbers_stay(name: str) -> None:
    plain, ours = both(name)
    norms = [module for module in ours.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(isinstance(norm, FoldedNorm) for norm in norms)
    assert list(ours.state_dict()) == list(plain.state_dict())
    with torch.inference_mode():
        for _ in range(2):  # with weights made new, then with the kept ones
            found, expected = ours(pictures()), plain(pictures())
            assert near(found, expected) and not torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_are_those_of_both(name: str) -> None:
    plain, ours = (network.double() for network in both(name))
    for network in (plain, ours):
        network(pictures().double()).square().sum().backward()
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert near(one.grad, other.grad, 1e-8)


def test_kept_weights_follow_what_they_are_made_of() -> None:
    plain, ours = both("tf_efficientnet_lite0")
    with torch.inference_mode():
        before = ours(pictures())
    ours(pictures()).square().sum().backward()
    torch.optim.SGD(ours.parameters(), 0.01).step()
    plain.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        assert near(ours(pictures()), plain(pictures())) and not near(ours(pictures()), before)
    for network in (plain, ours):
        with torch.no_grad():  # in place, while encoding goes on
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    assert module.running_mean is not None
                    module.running_mean.add_(0.5)
    with torch.inference_mode():
        assert near(ours(pictures()), plain(pictures()))
    ours.load_state_dict(both("tf_efficientnet_lite0")[0].state_dict())
    with torch.inference_mode():
        assert torch.equal(ours(pictures()), before)
        assert torch.equal(copy.deepcopy(ours)(pictures()), before)
    assert all(module.kept for module in ours.modules() if isinstance(module, FoldedConv))
    assert not any(module.kept for module in ours.train().modules() if isinstance(module, FoldedConv))


def test_halved_weights_are_those_that_autocast_rounds() -> None:
    _, image = both("tf_efficientnet_lite0")
    model = SharedTowers(Trunk(None, image), 8).eval()
    halved, ids = copy.deepcopy(model), torch.zeros(2, 0, dtype=torch.long)
    prepare(halved, CPU, "bf16")
    with torch.no_grad(), autocast(CPU, "bf16"):
        assert torch.equal(halved(pictures(), ids, None), model(pictures(), ids, None))
        rounded = halved(pictures(), ids, None)
    with torch.inference_mode():
        assert near(rounded, model(pictures(), ids, None), 0.1) and not near(
            rounded, model(pictures(), ids, None), 1e-4
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_an_export_is_timms() -> None:
    files = []
    for network in both("tf_efficientnet_lite0"):
        file = io.BytesIO()
        with torch.no_grad():
            torch.onnx.export(network, (pictures(1),), file, dynamo=False)
        files.append(file.getvalue())
    assert files[0] == files[1]


class Odd(nn.Module):
    """Convolutions that more than a norm reads, that run twice, or whose norm does."""

    def __init__(self) -> None:
        super().__init__()
        self.read_twice, self.run_twice, self.plain, self.biased = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(5))
        self.same = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.read_twice(x)
        x = self.norms[0](first) + first
        x = self.norms[1](self.run_twice(x)) + self.norms[2](self.run_twice(x))
        x = self.same(self.plain(x)) + self.same(x)
        found: Tensor = self.norms[4](self.norms[3](self.biased(x)))
        return found


def test_only_what_a_norm_alone_reads_is_folded() -> None:
    torch.manual_seed(0)
    ours = drawn(Odd())
    plain = copy.deepcopy(ours)
    fold_norms(ours, 8)
    assert [name for name, module in ours.named_modules() if isinstance(module, FoldedConv)] == ["biased"]
    assert [name for name, module in ours.named_modules() if isinstance(module, FoldedNorm)] == ["norms.3"]
    with torch.inference_mode():
        assert near(ours(pictures()), plain(pictures()))


@pytest.mark.parametrize("side", [1, 5, 20, 23, 40, 41])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(1, 2, 1), (2, 1, 1), (3, 2, 1), (5, 2, 1), (5, 3, 1), (3, 1, 2)]
)
def test_padding_alike_gives_the_places_of_timms(side: int, kernel: int, stride: int, dilation: int) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(
        Conv2dSame(4, 6, kernel, stride, dilation=dilation, groups=2, bias=False).double(), nn.BatchNorm2d(6).double()
    )
    ours = copy.deepcopy(drawn(plain))
    ours[0].norms = (ours[1],)  # type: ignore[assignment]
    ours[0].__class__, ours[1].__class__ = FoldedSame, FoldedNorm  # type: ignore[assignment]
    picture = torch.randn(2, 4, side, side + 3, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        found = ours(picture)
        torch.testing.assert_close(found, plain(picture), rtol=1e-9, atol=1e-9)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("side", [1, 5, 20, 23])
@pytest.mark.parametrize(
    ("kernel", "stride"), [((3, 3), 2), ((5, 5), 1), ((5, 5), 2), ((7, 7), 3), ((3, 5), 1), ((2, 4), 1)]
)
@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2dSame])
def test_depthwise_gradients_are_those_of_torch(
    kind: type[nn.Conv2d], side: int, kernel: tuple[int, int], stride: int
) -> None:
    torch.manual_seed(0)
    padding = 0 if kind is Conv2dSame else (kernel[0] // 2, kernel[1] // 2)
    plain = nn.Sequential(kind(16, 16, kernel, stride, padding, groups=16, bias=False), nn.BatchNorm2d(16)).eval()
    ours = copy.deepcopy(drawn(plain))
    ours[0].norms = (ours[1],)  # type: ignore[assignment]
    ours[0].__class__, ours[1].__class__ = CONVOLUTIONS[kind], FoldedNorm  # type: ignore[assignment]
    picture = torch.randn(2, 16, side, side + 3).contiguous(memory_format=torch.channels_last)
    gradients = []
    for network, dtype in ((plain.double(), torch.float64), (ours, torch.float32)):
        given = picture.to(dtype).requires_grad_()
        found = network(given)
        assert found.grad_fn is not None
        is_ours = network is ours and (kernel[1] > 3 or kind is Conv2dSame) and side >= kernel[0]
        assert (found.grad_fn.name() == "DepthwiseBackward") == is_ours or max(kernel) > 5
        found.backward(torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).to(dtype))
        gradients.append([found, given.grad, *(parameter.grad for parameter in network.parameters())])
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None and near(other.double(), one)


def test_statistics_of_a_batch_are_not_folded() -> None:
    """Of a network in torch's own training mode; ItemModel.train has none."""
    plain, ours = both("tf_efficientnet_lite0")
    assert torch.equal(ours.train()(pictures()), plain.train()(pictures()))


def test_a_size_that_the_network_cannot_take_is_for_whoever_gives_it() -> None:
    ours, before = drawn(Odd()), torch.is_grad_enabled()

    def refuse(x: Tensor) -> Tensor:
        raise RuntimeError("kernel size is greater than input size")

    ours.forward = refuse  # type: ignore[method-assign]
    fold_norms(ours, 8)
    assert not any(isinstance(module, FoldedConv) for module in ours.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in ours.modules())
    assert torch.is_grad_enabled() == before
