"""Estimate, before the first step, what memory training takes on a rank: weights, gradients, optimiser, activations.

A step is run on tensors that have shapes and no contents (torch's FakeTensorMode), so that the operators, autocast and
recomputing are those of the real step, in a few seconds at real size. `train` prints the line.
"""

import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tongkuan.base.errors import is_out_of_memory
from tongkuan.encode.encode import autocast
from tongkuan.model.towers import TwoTowers, pair_logits
from tongkuan.ranks.group import Ranks
from tongkuan.settings import Settings


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one rank. What a GPU's context and the kernels' own work space take comes on top."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    exchange: int
    """Buckets in which several ranks exchange gradients."""
    optimizer: int
    """Adam's two moments."""
    pairs: int
    """Of one part of a step."""
    activations: int
    """Kept for backward by the forward of one part, pictures included; with recomputing, the inputs of the blocks."""
    copies: int
    """Kept besides, whatever the number of pairs: autocast's copies of weights."""
    peak: int
    """Of a step: less than the sum, as activations go while gradients come, or more, as blocks are recomputed."""

    def parts(self) -> dict[str, int]:
        """Bytes by what they are for."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "exchange": self.exchange,
            "optimiser": self.optimizer,
            "copies in half precision": self.copies,
            "activations": self.activations,
        }

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {mebibytes(size)}" for name, size in self.parts().items() if size)
        pairs = f"{self.pairs} pairs of {mebibytes(self.activations // self.pairs)}"
        return f"memory of a rank in MiB, estimated: {figures} ({pairs}); peak {mebibytes(self.peak)}"


def mebibytes(size: int) -> str:
    """In the unit of nvidia-smi; small ones with a decimal."""
    number = size / 2**20
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"


class LiveStorages(TorchDispatchMode):
    """Counts the bytes that operators allocate and something still holds; views of one storage count once."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # not counted; held, for addresses are reused
        self._live: dict[int, object] = {storage._cdata: None for storage in self._known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._live:
            # The storage's end is the moment at which a real one would give its bytes back.
            self._live[key] = weakref.ref(storage, lambda _: self._drop(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        del self._live[key]
        self.now -= size


def part_loss(model: TwoTowers, settings: Settings, pairs: int, device: torch.device) -> Tensor:
    """The loss of pairs without common items, texts of full length: the most that a part may take."""
    inputs, size, tokens = settings.model.inputs, settings.model.image.size, settings.model.text.max_tokens
    side, width = (size if inputs != "text" else 1), (tokens if inputs != "image" else 1)
    images = torch.empty(2 * pairs, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    ids = torch.zeros(2 * pairs, width, dtype=torch.long, device=device)
    with autocast(device, settings.train.precision):
        embeddings = model(images, ids, torch.ones_like(ids))
    left, right = embeddings.float().split(pairs)
    return nn.functional.cross_entropy(pair_logits(left, right), ids[:pairs, 0])


def estimate_memory(
    model: TwoTowers, optimizer: torch.optim.Optimizer, settings: Settings, fellows: Ranks
) -> MemoryEstimate:
    """What a step of `model` will take on each rank. Changes neither the model nor any random state."""
    options, device = settings.train, fellows.device
    pairs = options.pairs // (fellows.count * options.accumulate)
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        fake = copy.deepcopy(model).train()
    state = [*fake.parameters(), *fake.buffers()]
    with mode:
        with LiveStorages(state) as step:
            loss = part_loss(fake, settings, pairs, device)
            kept = step.now
            loss.backward()
            if options.accumulate > 1:  # the next part meets the gradients of this one
                part_loss(fake, settings, pairs, device).backward()
        copies = 0
        if options.precision != "fp32":
            with LiveStorages(state) as double:
                loss = part_loss(fake, settings, 2 * pairs, device)
                copies = 2 * kept - double.now
    gradients = sum(p.grad.nbytes for p in fake.parameters() if p.grad is not None)
    exchange = gradients if fellows.count > 1 else 0
    # Adam goes through one group at once and needs one more tensor of each weight's size on the way.
    scratch = max(sum(p.nbytes for p in group["params"]) for group in optimizer.param_groups)
    weights, moments = sum(tensor.nbytes for tensor in state), 2 * gradients
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        exchange=exchange,
        optimizer=moments,
        pairs=pairs,
        activations=kept - copies,
        copies=copies,
        peak=weights + exchange + moments + max(step.peak, gradients + scratch),
    )


def describe_memory(model: TwoTowers, optimizer: torch.optim.Optimizer, settings: Settings, fellows: Ranks) -> str:
    """The estimate in a line, and another one when this GPU is too small for it."""
    try:
        estimate = estimate_memory(model, optimizer, settings, fellows)
    except Exception as error:  # an encoder that looks into its tensors' contents; an estimate must not cost a run
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        return f"memory: no estimate for these encoders ({reason})"
    line = str(estimate)
    if fellows.device.type == "cuda" and estimate.peak > (room := torch.cuda.mem_get_info(fellows.device)[1]):
        line += (
            f"\nmemory: this GPU has {mebibytes(room)} MiB; if it does not do, raise train.accumulate or set "
            "train.checkpoint_activations=true"
        )
    return line


@contextmanager
def noting_shortage(
    model: TwoTowers, optimizer: torch.optim.Optimizer, settings: Settings, fellows: Ranks
) -> Iterator[None]:
    """Have an error for want of memory carry a note on what takes the most of it, if that can be estimated."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            with suppress(Exception):
                parts = estimate_memory(model, optimizer, settings, fellows).parts()
                name = max(parts, key=lambda part: parts[part])
                error.add_note(f"of a step's memory the {name} take the most, {mebibytes(parts[name])} MiB")
        raise
