"""One training step: the optimiser, its schedule, and what is done to a model with the pairs of a batch."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tongkuan.encode.encode import autocast, chosen_precision
from tongkuan.encode.store import Batch, normalised
from tongkuan.learn.augment import augment
from tongkuan.learn.batches import Part
from tongkuan.learn.dataloader import Loaded
from tongkuan.learn.features import FeatureBatch, Joining
from tongkuan.learn.recorded import record_encoders
from tongkuan.model.blocks import numbered
from tongkuan.model.halves import arrange
from tongkuan.model.towers import pair_logits
from tongkuan.model.trunk import ItemModel, Kind
from tongkuan.ranks.arithmetic import tf32
from tongkuan.ranks.group import Ranks
from tongkuan.settings import Augmentation, Settings, TrainSettings


def learning_rate_at(step: int, peak: float, settings: TrainSettings) -> float:
    """Cosine from `peak` at step 0 to final_learning_rate at the last, under a linear rise of warmup_steps."""
    final = min(settings.final_learning_rate, peak)
    cosine = final + (peak - final) * (1 + math.cos(math.pi * step / settings.steps)) / 2
    return cosine * min(1.0, (step + 1) / (settings.warmup_steps + 1))


def make_optimizer(model: ItemModel, settings: TrainSettings) -> torch.optim.Adam:
    """Adam of what learns, with text encoders, image encoders and linear layers in groups of their own."""
    text, image = settings.learning_rate, settings.image_learning_rate or settings.learning_rate
    groups = [*encoder_groups(model, "text", text, settings), *encoder_groups(model, "image", image, settings)]
    groups.append({"params": model.joining(), "peak": settings.head_learning_rate or settings.learning_rate})
    return torch.optim.Adam(
        groups, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )


def encoder_groups(model: ItemModel, kind: Kind, peak: float, settings: TrainSettings) -> list[dict[str, Any]]:
    """Groups of what learns of the encoders, the fastest first; one a block where blocks have rates of their own."""
    by_peak: dict[float, list[nn.Parameter]] = {}
    for encoder in model.encoders(kind):
        has_own = settings.layer_decay != 1
        numbers = numbered(kind, encoder, f"train.layer_decay={settings.layer_decay:g}") if has_own else {}
        last = max(numbers.values(), default=0)
        for name, parameter in encoder.named_parameters():
            if parameter.requires_grad:
                own = peak * settings.layer_decay ** (last - numbers.get(name, last))
                by_peak.setdefault(own, []).append(parameter)
    return [{"params": by_peak[own], "peak": own} for own in sorted(by_peak, reverse=True)]


def learn(encoders: Sequence[nn.Module]) -> bool:
    """Whether there is something in each that learns."""
    return bool(encoders) and all(any(each.requires_grad for each in encoder.parameters()) for encoder in encoders)


class TrainStep:
    """Model, optimiser and scaler, and what one step does to them."""

    def __init__(self, model: ItemModel, settings: Settings, ranks: Ranks) -> None:
        self.model, self.settings, self.device = model, settings, ranks.device
        self.optimizer = make_optimizer(model, settings.train)
        self.precision = chosen_precision(settings.train.precision, ranks)
        arrange(model, self.precision)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.precision == "fp16")
        if settings.train.cuda_graphs and self.device.type == "cuda" and learn(model.encoders("image")):
            count = 2 * settings.train.pairs // ranks.world_size
            record_encoders(model, count, settings.model.image.size, self.precision, self.device)
        self.wrapped: nn.Module = Joining(model) if settings.train.reuses_features else model
        self.started, self.waited, self.steps = time.perf_counter(), 0.0, 0
        """Since when steps are counted, seconds that they have stood still for their input, and how many they are."""

    def take(self, step: int, loaded: Iterator[Loaded]) -> tuple[Tensor, Tensor]:
        """One optimiser step on the next `accumulate` parts: (this rank's mean loss, gradient norm before clipping)."""
        options = self.settings.train
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, group["peak"], options)
        self.optimizer.zero_grad(set_to_none=True)
        mean_loss = torch.zeros((), device=self.device)
        for number in range(options.accumulate):
            started = time.perf_counter()
            part, batch, labels = next(loaded)
            self.waited += time.perf_counter() - started
            with gradient_exchange(self.wrapped, is_last=number == options.accumulate - 1):
                loss = self.part_loss(part, batch.to(self.device), labels) / options.accumulate
                self.backward(self.scaler.scale(loss))
            mean_loss += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.steps += 1
        return mean_loss, norm

    def join(self, loaded: Loaded) -> None:
        """Have ranks exchange gradients from now on, of weights with which the next step can begin.

        DDP waits for a gradient of all that learns. What has no part in an embedding, such as the pooler of a text
        encoder, never gets one, so it is left out. And DDP forms its buckets anew after a process's first backward;
        the sum of three ranks or more depends on the place in them. So a process that resumes, and has no first step,
        must begin with the buckets that an unbroken one has.
        """
        self.rehearse(loaded)
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.grad is not None)
        self.optimizer.zero_grad(set_to_none=True)
        gpu = [self.device] if self.device.type == "cuda" else None
        # Buffers are the same on all ranks and stay so: statistics are not learned, see ItemModel.train.
        self.wrapped = DistributedDataParallel(
            self.wrapped, device_ids=gpu, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
        self.rehearse(loaded)
        self.optimizer.zero_grad(set_to_none=True)

    def rehearse(self, loaded: Loaded) -> None:
        """Gradients of a part's loss; nothing else of it remains."""
        part, batch, labels = loaded
        buffers = [buffer.clone() for buffer in self.model.buffers()]  # running means of a batch norm
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            self.backward(self.part_loss(part, batch.to(self.device), labels))
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)

    def backward(self, loss: Tensor) -> None:
        """Gradients, by products of the precision of the forward; autocast is no part of a backward."""
        with tf32(self.precision == "tf32" and self.device.type == "cuda"):
            loss.backward()

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """What happens inside is no step's time."""
        paused = time.perf_counter()
        yield
        self.started += time.perf_counter() - paused

    def take_times(self) -> tuple[float, float]:
        """(pairs a second, seconds a step stood still for its input) since the last question, 0 without a step.

        By a clock of our own: without a terminal, the progress bar has none.
        """
        now = time.perf_counter()
        speed = self.steps * self.settings.train.pairs / (now - self.started) if now > self.started else 0.0
        wait = self.waited / max(1, self.steps)
        self.started, self.waited, self.steps = now, 0.0, 0
        return speed, wait

    def inputs(self, part: Part, batch: Batch | FeatureBatch) -> tuple[Tensor | Mapping[str, Tensor] | None, ...]:
        """What the (wrapped) model is called with."""
        if isinstance(batch, FeatureBatch):
            return batch.raw, *batch.words
        options, model = self.settings.train, self.settings.model
        images, mask = normalised(batch, model.image), batch.attended
        if options.augmentation != Augmentation():  # its draws are made on the host
            place = (options.seed, part.step, part.rows, 2 * options.pairs, model.text.max_tokens)
            images, mask = augment(images, batch.mask, options.augmentation, *place)
        return images, batch.ids, mask, *batch.words

    def part_loss(self, part: Part, batch: Batch | FeatureBatch, labels: Tensor) -> Tensor:
        """Mean cross-entropy of a part's pairs; all items go through the (wrapped) model in one forward."""
        options = self.settings.train
        # Indexing by a list, or copying without non_blocking, would have the host wait for the device.
        left, right, classes = (
            torch.as_tensor(numbers).to(self.device, non_blocking=True) for numbers in (part.left, part.right, labels)
        )
        inputs = self.inputs(part, batch)
        with autocast(self.device, self.precision):
            embeddings = self.wrapped(*inputs)  # (items, 2D)
        embeddings = embeddings.float()
        loss = nn.functional.cross_entropy(pair_logits(embeddings[left], embeddings[right]), classes)
        if options.negatives:
            products = torch.as_tensor(part.products).to(self.device, non_blocking=True)
            loss = loss + options.negatives * negatives_loss(embeddings, products)
        return loss


def negatives_loss(embeddings: Tensor, products: Tensor) -> Tensor:
    """Mean of -log(1 - probability of the same product) over all two items of different products.

    embeddings float (N, 2D) and products int64 (N,) -> float (); 0 where all are of one product.
    """
    p, q = embeddings.chunk(2, dim=1)
    others = products.unsqueeze(1) != products
    losses = nn.functional.softplus(q @ q.T - p @ p.T) * others
    return losses.sum() / others.sum().clamp(min=1)


def gradient_exchange(model: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """Ranks exchange gradients once a step, in the backward of its last part."""
    if isinstance(model, DistributedDataParallel) and not is_last:
        return cast(AbstractContextManager[None], model.no_sync())
    return nullcontext()
