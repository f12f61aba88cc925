"""bf16 beyond autocast: residual sums of 16 bits, and compiled blocks."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import tiny_settings, train_words

from tongkuan.base.errors import UserError
from tongkuan.cli.verbs import main
from tongkuan.encode.encode import autocast, prepare
from tongkuan.learn.train import train
from tongkuan.model import halves
from tongkuan.model.halves import HalvedNorm, arrange, check_compiler, compile_blocks
from tongkuan.model.modelfile import load_model
from tongkuan.model.towers import build
from tongkuan.model.trunk import ItemModel

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SWIN = (
    "model.image.architecture=swin_tiny_patch4_window7_224",
    "model.image.arguments={img_size: 32, window_size: 4, embed_dim: 8, depths: [2, 2], num_heads: [2, 2]}",
)
BERT = {"model_type": "bert", "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"intermediate_size": 32, "max_position_embeddings": 32}


@pytest.fixture
def network(tmp_path: Path) -> ItemModel:
    torch.manual_seed(0)
    return build(tiny_settings(tmp_path, *SWIN).model, BERT, pretrained=False).eval()


def inputs(count: int = 3) -> tuple[Tensor, Tensor, None]:
    generator = torch.Generator().manual_seed(count)
    return (
        torch.rand(count, 3, 32, 32, generator=generator),
        torch.randint(50, (count, 7), generator=generator),
        None,
    )


def embeddings(network: ItemModel, precision: Any, count: int = 3) -> Tensor:
    with torch.no_grad(), autocast(CPU, precision):
        found: Tensor = network(*inputs(count))
    return found


class Sums(TorchDispatchMode):
    """Types of what is added, of pictures and of texts, and of what norms give."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        if name == "aten::add" and isinstance(args[1], Tensor) and result.dim() == 3:
            self.found[str(result.dtype)] += 1
        if name == "aten::native_layer_norm":
            self.found[f"norm {result[0].dtype}"] += 1
        return result


def test_residual_sums_are_of_16_bits(network: ItemModel) -> None:
    prepare(network, CPU, "bf16-residual")
    with Sums() as seen:
        embeddings(network, "bf16-residual")
    assert seen.found["norm torch.bfloat16"] and not seen.found["norm torch.float32"]
    layers = 2 * (2 + 4)  # of BERT and Swin in both towers, with two sums each
    assert seen.found["torch.bfloat16"] >= 2 * layers


def test_the_numbers_are_near_those_of_autocast(network: ItemModel) -> None:
    exact = embeddings(network, "fp32")
    plain = embeddings(network, "bf16")
    prepare(network, CPU, "bf16-residual")
    halved = embeddings(network, "bf16-residual")
    assert not torch.equal(halved, plain)
    size = float(exact.square().mean().sqrt())
    assert float((halved - exact).abs().max()) < 0.05 * size
    assert halved.dtype == torch.float32, "heads are as ever"


def test_a_norm_outside_of_autocast_is_a_norm(network: ItemModel) -> None:
    exact = embeddings(network, "fp32")
    arrange(network, "bf16-residual")
    assert sum(isinstance(module, HalvedNorm) for module in network.modules()) == 2 * (1 + 2 * 2) + 2 * (1 + 2 * 4 + 2)
    assert torch.equal(embeddings(network, "fp32"), exact)
    norm = HalvedNorm(4, bias=False)
    with autocast(CPU, "bf16"):
        assert norm(torch.rand(2, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", ["convnext_atto", "vit_tiny_patch16_224", "efficientnet_lite0"])
def test_encoders_with_other_norms_compute_too(tmp_path: Path, architecture: str) -> None:
    """timm has norms that turn axes first, and its own name for a plain one."""
    arguments = "{img_size: 32, depth: 2}" if "vit" in architecture else "{}"
    settings = tiny_settings(
        tmp_path, f"model.image.architecture={architecture}", f"model.image.arguments={arguments}"
    ).model
    network = build(settings, BERT, pretrained=False).eval()
    exact = embeddings(network, "fp32")
    prepare(network, CPU, "bf16-residual")
    assert float((embeddings(network, "bf16-residual") - exact).abs().max()) < 0.1 * float(exact.abs().max())


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_other_precisions_leave_norms_alone(network: ItemModel, precision: Any) -> None:
    prepare(network, CPU, precision)
    assert not any(isinstance(module, HalvedNorm) for module in network.modules())


def test_a_network_learns_with_residual_sums_of_16_bits(data: Path, tmp_path: Path) -> None:
    found = []
    for precision in ("bf16", "bf16-residual", "bf16-residual"):
        settings = tiny_settings(tmp_path, *SWIN, f"train.precision={precision}", "train.steps=4")
        run = tmp_path / str(len(found))
        train(settings, data, run, run / "m")
        found.append([row["loss"] for row in map(orjson.loads, (run / "metrics.jsonl").open()) if "loss" in row])
    assert found[1] == found[2] != found[0]
    np.testing.assert_allclose(found[1], found[0], rtol=0.05)
    loaded, card = load_model(tmp_path / "1" / "m")
    assert card.settings.image.architecture.startswith("swin")
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())


def test_predict_says_and_keeps_what_it_took(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = ("--data", str(data), "--model", str(model), "--submit", str(tmp_path / "s"))
    main(["predict", *inputs, "--precision", "bf16-residual"])
    assert "bf16-residual against fp32: " in capsys.readouterr().out
    assert orjson.loads((tmp_path / "s" / "manifest.json").read_bytes())["precision"] == "bf16-residual"
    main(["verify", *inputs])
    assert "rebuilt to the byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "there", "named", "told"),
    [
        (CPU, {"cc"}, None, "is for a GPU; use one, or begin again at fp32"),
        (GPU, set(), None, "none of cc, gcc, clang is there; install one, or use bf16-residual"),
        (GPU, {"gcc"}, "icx", "CC=icx is none"),
        (GPU, {"gcc"}, None, ""),
        (GPU, {"icx"}, "icx", ""),
    ],
)
def test_what_cannot_compile_is_one_line(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, there: set[str], named: str | None, told: str
) -> None:
    monkeypatch.setattr(halves.shutil, "which", lambda name: name if name in there else None)
    monkeypatch.delenv("CC", raising=False)
    if named:
        monkeypatch.setenv("CC", named)
    if not told:
        check_compiler(device)
        return
    with pytest.raises(UserError, match=told):
        check_compiler(device)


def test_nothing_is_written_where_nothing_compiles(data: Path, model: Path, tmp_path: Path) -> None:
    words = ("predict", "--data", data, "--model", model, "--submit", tmp_path / "s", "--precision", "bf16-compiled")
    for command in (words, train_words(tmp_path, data, "train.precision=bf16-compiled")):
        with pytest.raises(UserError, match="bf16-compiled is for a GPU"):
            main([*map(str, command)])
    assert not {path.name for path in tmp_path.rglob("*") if path.is_file()} - {"tiny.yaml"}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_blocks_of_a_kind_share_a_graph_for_any_number_of_pictures(network: ItemModel) -> None:
    graphs = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    expected = [embeddings(network, "bf16", count) for count in (3, 5, 2)]
    for _ in range(2):  # a second time changes nothing
        compile_blocks(network, compiler)
    found = [embeddings(network, "bf16", count) for count in (3, 5, 2)]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    towers, kinds = 2, 2 + 2 * 2  # of BERT's layers the last, and others; of Swin's blocks shifted ones, in two stages
    assert len(graphs) <= towers * kinds
    assert all(isinstance(graph, nn.Module) for graph in graphs)
