"""Train the two towers: by steps, on one rank or many, exactly resumable; the best model lands in `weights/`.

`./entrypoint.sh train --preset demo --data data --run runs/mine train.steps=500`
Run the same command again after an interruption: it goes on from the last checkpoint, to the same weights.
"""

import math
import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from tongkuan.base.errors import FaultError, UserError, clip, entrypoint
from tongkuan.base.files import check_target, check_writable, publish
from tongkuan.base.machine import keep_freed_memory
from tongkuan.base.metrics import average_precision, best_threshold, quality_at
from tongkuan.encode.encode import (
    autocast,
    batch_size,
    distinct_items,
    encode,
    length_batches,
    one_thread_each,
    scores_of,
)
from tongkuan.encode.store import Batch, ItemStore, augment, build_tokenizer, normalised, open_store, prefetch
from tongkuan.learn.batches import BatchDraw, Part, parts
from tongkuan.learn.memory import describe_memory, noting_shortage
from tongkuan.model.modelfile import ModelCard, Run, save_model
from tongkuan.model.towers import TwoTowers, build, checkpoint_activations, pair_logits, text_config_of, whiten_head
from tongkuan.ranks.group import Ranks, StopRequests, ranks
from tongkuan.records.attributes import item_text
from tongkuan.records.items import Pair, item_file, pair_file, read_items, read_pairs
from tongkuan.records.labels import NAMES, contradiction_note, only_label
from tongkuan.result.evaluate import labels_of
from tongkuan.settings import Augmentation, Settings, TrainSettings

WHITEN_ITEMS = 768  # enough to know their spread by, and quick

WHITEN_NORMS = (0.3, 3.0)  # of the threshold and the commodity tower's embeddings


@dataclass(frozen=True, slots=True)
class Task:
    """What there is to learn from and to validate on."""

    train_pairs: list[Pair]
    train_store: ItemStore
    valid_pairs: list[Pair]
    valid_store: ItemStore
    card: ModelCard
    """Settings, tokenizer and text configuration of the model to be."""
    notes: tuple[str, ...] = ()
    """A line on each thing that the labels cannot tell."""


def load_task(settings: Settings, data_dir: Path) -> Task:
    """Read and check both splits before anything costs time."""
    items, pairs, notes = {}, {}, []
    for split in ("train", "valid"):
        path = item_file(data_dir, split)
        items[split] = read_items(path)
        pairs[split] = read_pairs(pair_file(data_dir, split), items[split], items_path=path)
        notes.append(contradiction_note(pair_file(data_dir, split), pairs[split]))
    check_train_labels(pair_file(data_dir, "train"), pairs["train"])
    notes.append(valid_labels_note(pair_file(data_dir, "valid"), pairs["valid"]))
    model = settings.model
    tokenizer, text_config = None, None
    if model.inputs != "image":
        texts = (item_text(item, model.attribute_keys, model.attributes) for item in items["train"].values())
        tokenizer = build_tokenizer(model.text, texts)
        text_config = text_config_of(model.text, tokenizer.get_vocab_size())
    card = ModelCard(model, 0.0, text_config, tokenizer.to_str() if tokenizer else None)
    stores = [
        open_store(items[split], data_dir, model, card.open_tokenizer(), settings.data.cache_mb)
        for split in ("train", "valid")
    ]
    return Task(pairs["train"], stores[0], pairs["valid"], stores[1], card, tuple(filter(None, notes)))


def check_train_labels(path: Path, pairs: Sequence[Pair]) -> None:
    """UserError when all pairs have one label: the loss then falls without an end, whatever the items are."""
    if (label := only_label(pairs)) is not None:
        raise UserError(
            f"{path}: all {len(pairs):,} pairs have label {label}, from which a model only learns to call any pair "
            f"{NAMES[label]}; add pairs of label {1 - label}, or draw train and valid anew: ./entrypoint.sh split"
        )


def valid_labels_note(path: Path, pairs: Sequence[Pair]) -> str:
    """A line when all pairs have one label, else nothing."""
    if (label := only_label(pairs)) is None:
        return ""
    return (
        f"note: {path}: only pairs of label {label}: no threshold can be chosen there and no step be told the best, so "
        f"the last step's model is kept, with threshold 0, as trained; add pairs of label {1 - label}, or draw train "
        "and valid anew: ./entrypoint.sh split"
    )


def learning_rate_at(step: int, peak: float, settings: TrainSettings) -> float:
    """Cosine from `peak` at step 0 to final_learning_rate at the last, under a linear rise of warmup_steps."""
    final = min(settings.final_learning_rate, peak)
    cosine = final + (peak - final) * (1 + math.cos(math.pi * step / settings.steps)) / 2
    return cosine * min(1.0, (step + 1) / (settings.warmup_steps + 1))


Loaded = tuple[Part, Batch, Tensor]


def load_parts(task: Task, settings: Settings, fellows: Ranks, first_step: int) -> Generator[Loaded]:
    """`parts` with their items as tensors and their labels, decoded ahead."""

    def load(part: Part) -> Loaded:
        batch = task.train_store.batch(part.item_ids)
        return part, batch.pin() if fellows.device.type == "cuda" else batch, torch.from_numpy(labels_of(part.pairs))

    return prefetch(parts(task.train_pairs, settings.train, fellows, first_step), load, settings.data.workers)


def validate(model: TwoTowers, task: Task, settings: Settings, fellows: Ranks, run: Run, step: int) -> None:
    """Choose the threshold on the validation pairs, log, and keep the model if it is the best so far.

    Pairs of one label choose nothing: any F1 there is reached by calling all pairs alike. The newest model is kept.
    """
    model.eval()
    item_ids = distinct_items(task.valid_pairs)
    embeddings = encode(model, task.valid_store, item_ids, settings.data, fellows, settings.train.precision, "validate")
    model.train()
    scores, labels = scores_of(task.valid_pairs, embeddings), labels_of(task.valid_pairs)
    is_undecided = only_label(task.valid_pairs) is not None
    at_zero, precision = quality_at(scores, labels, 0.0).f1, average_precision(scores, labels)
    threshold, f1 = (0.0, at_zero) if is_undecided else best_threshold(scores, labels)
    figures = {"valid_f1": f1, "threshold": threshold, "valid_f1_at_0": at_zero, "valid_average_precision": precision}
    run.log(step, figures)
    if not fellows.is_first:
        return
    is_kept = is_undecided or f1 > run.best_f1
    if is_undecided:
        right = np.mean((scores > 0) == (labels == 1))
        tqdm.write(f"step {step}: {right:.1%} of the valid pairs, all of label {labels[0]}, told right at 0; kept")
    else:
        kept = ", best so far" if is_kept else ""
        tqdm.write(f"step {step}: valid F1 {f1:.4f} at {threshold:.4f}, {at_zero:.4f} at 0{kept}")
    if is_kept:
        run.best_f1 = f1
        facts = {"step": step, **figures, "train": settings.train.model_dump(mode="json")}
        card = ModelCard(settings.model, threshold, task.card.text_config, task.card.tokenizer, facts)
        save_model(run.best, model, card)


def make_optimizer(model: TwoTowers, settings: TrainSettings) -> torch.optim.Adam:
    """Adam with text encoders, image encoders and linear layers in groups of their own."""
    peaks = {
        "text": settings.learning_rate,
        "image": settings.image_learning_rate or settings.learning_rate,
        "head": settings.head_learning_rate or settings.learning_rate,
    }
    groups = []
    for part, peak in peaks.items():
        modules = (getattr(tower, part) for tower in (model.threshold, model.commodity))
        parameters = [p for module in modules if module is not None for p in module.parameters()]
        if parameters:
            groups.append({"params": parameters, "peak": peak})
    return torch.optim.Adam(
        groups, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )


def check_batch(settings: TrainSettings, fellows: Ranks) -> None:
    """UserError when the global batch cannot be dealt evenly."""
    share = fellows.count * settings.accumulate
    if settings.pairs % share:
        raise UserError(
            f"train.pairs={settings.pairs} over {fellows.count} ranks x {settings.accumulate} parts is uneven; "
            f"make it a multiple of {share}"
        )


def train(settings: Settings, data_dir: Path, run_dir: Path, model_path: Path) -> None:
    """Train to settings.train.steps, resuming what `run_dir` holds, and publish the best model at `model_path`."""
    check_writable(run_dir)
    check_target(model_path)
    task = load_task(settings, data_dir)
    with ranks() as fellows:
        check_batch(settings.train, fellows)
        if settings.train.threads is not None:
            torch.set_num_threads(settings.train.threads)
        torch.manual_seed(settings.train.seed)
        model = build(settings.model, task.card.text_config, pretrained=True).to(fellows.device)
        if settings.train.checkpoint_activations:
            checkpoint_activations(model)
        run = Run(run_dir, settings, fellows)
        if settings.train.whiten and run.is_new:
            whiten(model, task, settings, fellows)
        torch.manual_seed(settings.train.seed + 1 + fellows.rank)  # dropout differs from rank to rank
        learn(model, task, settings, fellows, run)
        run.close()
        if fellows.is_first:
            with publish(model_path) as file, run.best.open("rb") as source:
                shutil.copyfileobj(source, file)
            for store in (task.train_store, task.valid_store):
                if complaint := store.complaint():
                    print(complaint)
            is_undecided = only_label(task.valid_pairs) is not None
            kept = "the last" if is_undecided else "best"
            told = "threshold 0, none chosen" if is_undecided else f"valid F1 {run.best_f1:.4f}"
            print(f"{model_path}: {kept} of {settings.train.steps} steps, {told}")
            print(f"next: {entrypoint('predict', '--data', data_dir, '--model', model_path)}")


def whiten(model: TwoTowers, task: Task, settings: Settings, fellows: Ranks) -> None:
    """whiten_head of both towers on the first training items by id; the same on every rank."""
    item_ids = distinct_items(task.train_pairs)
    chosen = sorted(item_ids)[:WHITEN_ITEMS]
    size = batch_size(settings.data, settings.model, fellows.device)
    model.eval()
    with one_thread_each(), torch.no_grad():
        features: list[list[Tensor]] = [[], []]
        for item_batch in length_batches(task.train_store, chosen, size):
            batch = task.train_store.batch(item_batch).to(fellows.device)
            images = normalised(batch, settings.model.image)
            for found, tower in zip(features, (model.threshold, model.commodity), strict=True):
                found.append(tower.features(images, batch.ids, batch.mask).cpu())
        # Two like towers would cancel out. So scores start as likeness (q.q), and thresholds (p.p) near 0.
        for found, tower, norm in zip(features, (model.threshold, model.commodity), WHITEN_NORMS, strict=True):
            whiten_head(tower.head, torch.cat(found), norm)


class Learner:
    """Model, optimiser and scaler, and what one step does to them."""

    def __init__(self, model: TwoTowers, settings: Settings, fellows: Ranks) -> None:
        self.model, self.settings, self.device = model, settings, fellows.device
        self.optimizer = make_optimizer(model, settings.train)
        self.scaler = torch.amp.GradScaler(fellows.device.type, enabled=settings.train.precision == "fp16")
        self.wrapped: nn.Module = model
        if fellows.count > 1:
            gpu = [fellows.device] if fellows.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(model, device_ids=gpu)
        self.started, self.waited, self.steps = time.perf_counter(), 0.0, 0
        """Since when steps are counted, seconds that they have stood still for their input, and how many they are."""

    def step(self, step: int, loaded: Iterator[Loaded]) -> tuple[Tensor, Tensor]:
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
                self.scaler.scale(loss).backward()
            mean_loss += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.steps += 1
        return mean_loss, norm

    def take_times(self) -> tuple[float, float]:
        """(pairs a second, seconds a step stood still for its input) since the last question, 0 without a step.

        By a clock of our own: without a terminal, the progress bar has none.
        """
        now = time.perf_counter()
        speed = self.steps * self.settings.train.pairs / (now - self.started) if now > self.started else 0.0
        wait = self.waited / max(1, self.steps)
        self.started, self.waited, self.steps = now, 0.0, 0
        return speed, wait

    def part_loss(self, part: Part, batch: Batch, labels: Tensor) -> Tensor:
        """Mean cross-entropy of a part's pairs; all items go through the (wrapped) model in one forward."""
        options = self.settings.train
        # Indexing by a list, or copying without non_blocking, would have the host wait for the device.
        left, right, classes = (
            torch.as_tensor(numbers).to(self.device, non_blocking=True) for numbers in (part.left, part.right, labels)
        )
        images, mask = normalised(batch, self.settings.model.image), batch.mask
        if options.augmentation != Augmentation():  # its draws are made on the host
            place = (options.seed, part.step, part.rows, 2 * options.pairs, self.settings.model.text.max_tokens)
            images, mask = augment(images, mask, options.augmentation, *place)
        with autocast(self.device, options.precision):
            embeddings = self.wrapped(images, batch.ids, mask)  # (items, 2D)
        embeddings = embeddings.float()
        return nn.functional.cross_entropy(pair_logits(embeddings[left], embeddings[right]), classes)


def learn(model: TwoTowers, task: Task, settings: Settings, fellows: Ranks, run: Run) -> None:
    """The training loop: data, step, log, validate, save."""
    options = settings.train
    keep_freed_memory()
    learner = Learner(model, settings, fellows)
    if fellows.is_first:
        lines = [
            describe_memory(model, learner.optimizer, settings, fellows),
            *task.notes,
            *task.train_store.coverage(),
        ]
        print("\n".join(lines), flush=True)
    done = run.resume(model, learner.optimizer, learner.scaler)
    if done and fellows.is_first:
        run.write_metrics()  # killed just after last.pt, a run that is done would never write them
    if run.owes_validation:
        validate(model, task, settings, fellows, run, done)
        run.save(done, model, learner.optimizer, learner.scaler)
    model.train()

    loaded = load_parts(task, settings, fellows, done)
    pairs = options.pairs
    quiet = None if fellows.is_first else True
    bar = tqdm(total=options.steps * pairs, initial=done * pairs, desc="train", unit="pair", disable=quiet)
    shortage = noting_shortage(model, learner.optimizer, settings, fellows)
    learner.take_times()
    with shortage, StopRequests(fellows) as requests, bar as progress:
        for step in range(done, options.steps):
            loss, norm = learner.step(step, loaded)
            run.losses.append(loss)
            progress.update(pairs)
            finished, is_last = step + 1, step + 1 == options.steps
            everies = (options.log_every, options.validate_every, options.save_every)
            is_row, is_validated, is_saved = (finished % every == 0 or is_last for every in everies)
            is_stopped = requests.after(finished)
            is_saved |= is_stopped
            if is_row or is_validated or is_saved:  # before a state that is none is kept
                mean = float(np.mean(fellows.gather(float(torch.stack(run.losses).mean()))))
                size = float(norm)
                if not math.isfinite(mean) or not (math.isfinite(size) or learner.scaler.is_enabled()):
                    raise FaultError(fault(task, options, fellows, run, finished))
            if is_row:
                run.losses.clear()
                rate = learner.optimizer.param_groups[0]["lr"]
                figures = {"loss": mean, "gradient_norm": size, "learning_rate": rate}
                speed, wait = learner.take_times()
                run.log(finished, figures, {"pairs_per_second": speed, "data_wait_seconds": wait})
                progress.set_postfix(loss=f"{mean:.4f}", data_wait=f"{1000 * wait:.1f} ms")
            paused = time.perf_counter()
            if is_validated and not is_stopped:
                validate(model, task, settings, fellows, run, finished)
            if is_saved:
                owes = is_validated and is_stopped
                run.save(finished, model, learner.optimizer, learner.scaler, owes)
            learner.started += time.perf_counter() - paused  # no step's time
            if is_stopped:
                break


def fault(task: Task, options: TrainSettings, fellows: Ranks, run: Run, finished: int) -> str:
    """A line on the first step since the last row whose loss, or the last step whose gradient, is no number.

    Told when something is to be kept: looking at each step's loss would have the host wait for the device.
    """
    by_rank = np.array(fellows.gather([float(loss) for loss in run.losses]))  # (ranks, steps)
    lost = np.flatnonzero(~np.isfinite(by_rank).all(axis=0))
    step = finished - by_rank.shape[1] + int(lost[0]) if len(lost) else finished - 1
    what = "loss" if len(lost) else "gradient"
    pairs = ", ".join(f"{pair.left}-{pair.right}" for pair in BatchDraw(task.train_pairs, options).batch(step)[:8])
    state = f"{run.last} is the last good state" if run.last.exists() else "there is no checkpoint yet"
    return (
        f"the {what} of step {step + 1} is not a number (pairs {clip(pairs, 300)}); {state}: look at these pairs, "
        "or lower train.learning_rate or train.clip_norm"
    )


def gradient_exchange(model: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """Ranks exchange gradients once a step, in the backward of its last part."""
    if isinstance(model, DistributedDataParallel) and not is_last:
        return cast(AbstractContextManager[None], model.no_sync())
    return nullcontext()
