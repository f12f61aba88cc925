"""What could bring the encoders nearer to the device's limit: each way beside the plain one."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from run import attend_by, compile_blocks
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from gpu_sections.bench import NEEDS_CUDA, Bench, Way, compare, prepared
from gpu_sections.book import Page
from gpu_sections.train import flops_an_item, ours
from tongkuan.model.towers import TwoTowers
from tongkuan.model.trunk import ItemModel
from tongkuan.model.windows import FoldedStage, FoldedWindows

SMALL = 4  # items, where launching is what takes the time
Forward = Callable[[], Tensor]
Change = Callable[[Any], None]
"""Of a network, where it is."""


def near(bench: Bench, page: Page) -> None:
    """In bf16: windows folded into heads, residual sums in bf16, CUDA graphs, compiled blocks, and both together."""
    parts: dict[str, Callable[[Bench, Page], None]] = {"windows": windows, "CUDA graphs": graphs}
    parts |= {"cuDNN": cudnn, "residual": partial(changed, name="bf16 residual", change=halve_norms)}
    parts |= {"training": learning, "compiled blocks": compiled, "compiled, training": learning_compiled}
    for name, part in parts.items():
        if page.has_time(name):
            with page.trying(name):
                part(bench, page)


def forward(bench: Bench, model: TwoTowers, size: int) -> Forward:
    """Embeddings of a batch that is on the device, as predict computes them in bf16."""
    inputs = bench.inputs(bench.batch(size))

    def run() -> Tensor:
        with torch.inference_mode(), bench.computing("bf16"):
            found: Tensor = model(*inputs)
        return found

    return run


def beside(bench: Bench, page: Page, name: str, plain: Forward, other: Forward, size: int) -> None:
    """Rows of both, and of how far the numbers of the second are from the first's."""
    work = size * bench.forward_flops
    ways = {f"{name}: without": Way(plain, size, "bf16", work), f"{name}: with": Way(other, size, "bf16", work)}
    compare(bench, page, "items/s", ways)
    one, two = plain().float(), other().float()
    worst, largest = float((one - two).abs().max()), float(one.abs().max())
    page.measured(f"{name}: largest difference", worst, note=f"largest number {largest:.3g}")


def changed(bench: Bench, page: Page, name: str, change: Change) -> None:
    """Embeddings by the network as predict has it, and with a change."""
    plain, other = prepared(bench, "bf16"), prepared(bench, "bf16")
    change(other)
    size = bench.usual
    beside(bench, page, name, forward(bench, plain, size), forward(bench, other, size), size)


def unfold(model: nn.Module) -> None:
    """Have Swin's windows and pixels go timm's way."""
    attend_by(model, WindowAttention)
    for module in model.modules():
        if isinstance(module, FoldedStage):
            module.is_folded = False


def windows(bench: Bench, page: Page) -> None:
    """Swin by timm's way, and with windows and pixels folded, as predict has them."""
    plain, folded = prepared(bench, "bf16"), prepared(bench, "bf16")
    unfold(plain)
    size = bench.usual
    beside(bench, page, "windows folded", forward(bench, plain, size), forward(bench, folded, size), size)


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Attention by torch's own kernels: cuDNN plans anew for each shape of a batch."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def cudnn(bench: Bench, page: Page) -> None:
    """Embeddings with attention by cuDNN where torch chooses it, and without."""
    run = forward(bench, prepared(bench, "bf16"), bench.usual)
    beside(bench, page, "attention without cuDNN", run, without_cudnn()(run), bench.usual)


class AlwaysFolded(FoldedWindows):
    """Folded where it learns, too."""

    def folds(self) -> bool:
        """As FoldedWindows."""
        return True


class HalvedNorm(nn.LayerNorm):
    """A norm that gives 16 bits where autocast's gives 32: so residual sums are of 16 bits, too."""

    def forward(self, input: Tensor) -> Tensor:
        """As nn.LayerNorm; sums within the norm are of 32 bits still."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            weight, bias = self.weight.to(dtype), self.bias.to(dtype)
            return layer_norm(input.to(dtype), self.normalized_shape, weight, bias, self.eps)


def halve_norms(model: ItemModel) -> None:
    """Have the encoders' norms be HalvedNorm."""
    for encoder in (*model.encoders("text"), *model.encoders("image")):
        for module in encoder.modules():
            if isinstance(module, nn.LayerNorm):
                module.__class__ = HalvedNorm
                if not module.training:
                    module.to(torch.bfloat16)


def halve_and_compile(model: ItemModel, compiler: str) -> None:
    """Both."""
    halve_norms(model)
    compile_blocks(model, compiler)


def graphs(bench: Bench, page: Page) -> None:
    """A small batch whose launches are recorded once: how much of its time is launching."""
    run = forward(bench, prepared(bench, "bf16"), SMALL)
    name = f"CUDA graph, batch {SMALL}"
    if not bench.is_gpu:
        run()
        page.not_measured(name, NEEDS_CUDA)
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries find their ways before anything is recorded
        for _ in range(bench.sizes.warm_ups):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    beside(bench, page, name, run, replay, SMALL)


def learning(bench: Bench, page: Page) -> None:
    """Training steps launched kernel by kernel, and played back: with windows as predict has them, with bf16 sums."""
    learn(bench, page, {"timm's way": unfold})
    learn(bench, page, {"windows folded": partial(attend_by, kind=AlwaysFolded), "bf16 residual": halve_norms}, True)
    with without_cudnn():
        learn(bench, page, {}, name="attention without cuDNN")


def compiling(bench: Bench) -> dict[str, Change]:
    """Blocks compiled one by one: few graphs, since blocks of one kind share theirs."""
    compiler = bench.sizes.compiler
    return {
        "compiled blocks and bf16 residual": partial(halve_and_compile, compiler=compiler),
        "compiled blocks": partial(compile_blocks, compiler=compiler),
    }


def compiled(bench: Bench, page: Page) -> None:
    """Embeddings by compiled blocks."""
    for name, change in compiling(bench).items():
        if page.has_time(name) and not lacks_compiler(bench, page, name):
            with page.trying(name):
                changed(bench, page, name, change)


def learning_compiled(bench: Bench, page: Page) -> None:
    """Training steps with compiled blocks."""
    if not lacks_compiler(bench, page, "compiled blocks, training"):
        learn(bench, page, compiling(bench))


def learn(bench: Bench, page: Page, changes: Mapping[str, Change], graphs: bool = False, name: str = "plain") -> None:
    """Training steps as they are, then with each change, each alone on the device."""
    few, base = bench.sizes.pairs[0], None
    work = flops_an_item(bench, bench.sizes.published_pairs)
    for way, change in {name: None, **changes}.items():
        name = f"training, bf16, {way}{', CUDA graphs' if graphs else ''}"
        if page.has_time(name):
            with page.trying(name):
                steps = ours(bench, work, "bf16", change, pairs=few, cuda_graphs=graphs)
                rates = compare(bench, page, "pairs/s", {name: steps}, base)
                base = base or rates


def lacks_compiler(bench: Bench, page: Page, name: str) -> bool:
    """Whether there is no C compiler, which torch's compiler calls; a row then says so."""
    if bench.sizes.compiler != "inductor" or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"):
        return False
    page.not_measured(name, "no C compiler here (gcc); the image has none")
    return True
