"""What could bring the encoders nearer to the device's limit: each way beside the plain one."""

import copy
import shutil
from collections.abc import Callable
from functools import partial

import torch
from run import attend_by, compile_blocks
from timm.models.swin_transformer import WindowAttention
from torch import Tensor

from gpu_sections.bench import NEEDS_CUDA, Bench, Way, compare, prepared
from gpu_sections.book import Page
from gpu_sections.train import ours
from tongkuan.model.towers import TwoTowers
from tongkuan.model.windows import FoldedWindows

SMALL = 4  # items, where launching is what takes the time
Forward = Callable[[], Tensor]


def near(bench: Bench, page: Page) -> None:
    """In bf16: windows folded into heads, a pure bf16 network, CUDA graphs, compiled blocks."""
    parts = {"windows": windows, "residual": residual, "CUDA graphs": graphs}
    parts |= {"windows, training": learning_windows, "compiled blocks": compiled, "compiled, training": learning}
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
    ways = {f"{name}: without": Way(plain, size, "bf16"), f"{name}: with": Way(other, size, "bf16")}
    compare(bench, page, "items/s", ways)
    one, two = plain().float(), other().float()
    worst, largest = float((one - two).abs().max()), float(one.abs().max())
    page.measured(f"{name}: largest difference", worst, note=f"largest number {largest:.3g}")


def windows(bench: Bench, page: Page) -> None:
    """Swin's windows by timm's way, and folded into heads, as predict has them."""
    model = prepared(bench, "bf16")
    attend_by(model, WindowAttention)
    plain, folded = (forward(bench, each, bench.usual) for each in (model, prepared(bench, "bf16")))
    beside(bench, page, "windows folded", plain, folded, bench.usual)


def learning_windows(bench: Bench, page: Page) -> None:
    """Training steps with windows by timm's way, as train has them, and folded."""
    few = bench.sizes.pairs[0]
    ways = {"training, bf16": ours(bench, 0, "bf16", pairs=few)}
    fold = partial(attend_by, kind=AlwaysFolded)
    ways["training, bf16, windows folded"] = ours(bench, 0, "bf16", change=fold, pairs=few)
    compare(bench, page, "pairs/s", ways)


class AlwaysFolded(FoldedWindows):
    """Folded where it learns, too."""

    def folds(self) -> bool:
        """As FoldedWindows."""
        return True


def residual(bench: Bench, page: Page) -> None:
    """Norms and residual sums in bf16 too, which autocast leaves at fp32."""
    pure, (images, *rest) = copy.deepcopy(bench.made.model), bench.inputs(bench.batch(bench.usual))
    for encoder in (*pure.encoders("text"), *pure.encoders("image")):
        encoder.to(torch.bfloat16)

    def run() -> Tensor:
        with torch.inference_mode():
            found: Tensor = pure(images.to(torch.bfloat16), *rest)
        return found

    plain = forward(bench, prepared(bench, "bf16"), bench.usual)
    beside(bench, page, "bf16 residual", plain, run, bench.usual)


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


def compiled(bench: Bench, page: Page) -> None:
    """Blocks compiled one by one: few graphs, since blocks of one kind share theirs."""
    if lacks_compiler(bench, page, "compiled blocks"):
        return
    plain = forward(bench, prepared(bench, "bf16"), bench.usual)
    model = prepared(bench, "bf16")
    compile_blocks(model, bench.sizes.compiler)
    other = forward(bench, model, bench.usual)
    beside(bench, page, "compiled blocks", plain, other, bench.usual)


def learning(bench: Bench, page: Page) -> None:
    """Training steps with compiled blocks."""
    if lacks_compiler(bench, page, "compiled blocks, training"):
        return
    few = bench.sizes.pairs[0]
    ways = {"training, bf16": ours(bench, 0, "bf16", pairs=few)}
    change = partial(compile_blocks, compiler=bench.sizes.compiler)
    ways["training, bf16, compiled blocks"] = ours(bench, 0, "bf16", change=change, pairs=few)
    compare(bench, page, "pairs/s", ways)


def lacks_compiler(bench: Bench, page: Page, name: str) -> bool:
    """Whether there is no C compiler, which torch's compiler calls; a row then says so."""
    if bench.sizes.compiler != "inductor" or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"):
        return False
    page.not_measured(name, "no C compiler here (gcc); the image has none")
    return True
