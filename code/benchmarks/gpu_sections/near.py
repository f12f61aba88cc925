"""What could bring the encoders nearer to the device's limit: each way beside the plain one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from run import attend_by
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from gpu_sections.bench import NEEDS_CUDA, Bench, Way, compare, prepared
from gpu_sections.book import Page
from gpu_sections.train import flops_an_item, ours
from tongkuan.base.errors import UserError
from tongkuan.model.halves import check_compiler, compile_blocks
from tongkuan.model.towers import TwoTowers
from tongkuan.model.windows import FoldedStage, FoldedWindows
from tongkuan.ranks.arithmetic import own_attention
from tongkuan.settings import Precision

SMALL = 4  # items, where launching is what takes the time
Forward = Callable[[], Tensor]


def near(bench: Bench, page: Page) -> None:
    """In bf16: Swin's windows folded, residual sums in bf16, compiled blocks, CUDA graphs, attention by cuDNN."""
    parts = {"windows": windows, "residual": residual, "compiled blocks": compiled, "CUDA graphs": graphs}
    for name, part in (parts | {"cuDNN": cudnn, "training": learning, "compiled, training": learning_compiled}).items():
        if page.has_time(name):
            with page.trying(name):
                part(bench, page)


def forward(bench: Bench, model: TwoTowers, size: int) -> Forward:
    """Embeddings of a batch that is on the device, as predict computes them in bf16."""
    inputs = bench.inputs(bench.batch(size))

    def run() -> Tensor:
        with bench.encoding("bf16"):
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


def networks(bench: Bench, page: Page, name: str, plain: TwoTowers, other: TwoTowers) -> None:
    """Embeddings by two networks."""
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
    plain = prepared(bench, "bf16")
    unfold(plain)
    networks(bench, page, "windows folded", plain, prepared(bench, "bf16"))


def residual(bench: Bench, page: Page) -> None:
    """Residual sums at fp32 and in bf16."""
    networks(bench, page, "bf16-residual", prepared(bench, "bf16"), prepared(bench, "bf16-residual"))


def compiled(bench: Bench, page: Page) -> None:
    """Blocks compiled one by one, residual sums in bf16 with both."""
    if has_compiler(bench, page, "bf16-compiled"):
        other = prepared(bench, "bf16-residual")
        compile_blocks(other, bench.sizes.compiler)
        networks(bench, page, "bf16-compiled", prepared(bench, "bf16-residual"), other)


def cudnn(bench: Bench, page: Page) -> None:
    """Embeddings with attention by torch's own kernels, as predict has it, and by cuDNN where torch chooses that."""
    model, inputs = prepared(bench, "bf16"), bench.inputs(bench.batch(bench.usual))

    def run() -> Tensor:
        with torch.inference_mode(), bench.computing("bf16"):
            found: Tensor = model(*inputs)
        return found

    beside(bench, page, "attention by cuDNN", forward(bench, model, bench.usual), run, bench.usual)


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


class AlwaysFolded(FoldedWindows):
    """Folded where it learns, too."""

    def folds(self) -> bool:
        """As FoldedWindows."""
        return True


def learning(bench: Bench, page: Page) -> None:
    """Training steps, then played back: as they are, pixels timm's way, windows as predict has them, bf16 sums."""
    base = learn(bench, page, "bf16")
    with own_attention():
        learn(bench, page, "bf16, attention by torch's own kernels", base)
    learn(bench, page, "bf16, CUDA graphs", base, cuda_graphs=True)
    learn(bench, page, "bf16, CUDA graphs, timm's way", base, change=unfold, cuda_graphs=True)
    fold = partial(attend_by, kind=AlwaysFolded)
    learn(bench, page, "bf16, CUDA graphs, windows folded", base, change=fold, cuda_graphs=True)
    learn(bench, page, "bf16-residual, CUDA graphs", base, "bf16-residual", cuda_graphs=True)


def learning_compiled(bench: Bench, page: Page) -> None:
    """Training steps with compiled blocks, launched and played back."""
    if has_compiler(bench, page, "bf16-compiled, training"):
        base = learn(bench, page, "bf16-residual", way="bf16-residual")
        change = partial(compile_blocks, compiler=bench.sizes.compiler)
        learn(bench, page, "bf16-compiled", base, "bf16-residual", change)
        learn(bench, page, "bf16-compiled, CUDA graphs", base, "bf16-residual", change, cuda_graphs=True)


def learn(
    bench: Bench,
    page: Page,
    name: str,
    base: list[float] | None = None,
    way: Precision = "bf16",
    change: Callable[[Any], Any] | None = None,
    cuda_graphs: bool = False,
) -> list[float] | None:
    """A row on training steps, beside the rates of `base`; their own rates."""
    if page.has_time(f"training, {name}"):
        with page.trying(f"training, {name}"):
            work, few = flops_an_item(bench, bench.sizes.published_pairs), bench.sizes.pairs[0]
            steps = ours(bench, work, way, change, pairs=few, cuda_graphs=cuda_graphs)
            return compare(bench, page, "pairs/s", {f"training, {name}": steps}, base)
    return None


def has_compiler(bench: Bench, page: Page, name: str) -> bool:
    """Whether there is a C compiler; if not, a row says so."""
    try:
        if bench.sizes.compiler == "inductor":
            check_compiler(bench.device)
    except UserError as error:
        page.not_measured(name, str(error))
        return False
    return True
