"""Train the two towers: by steps, on one rank or many, exactly resumable; the best model lands in `weights/`.

`./entrypoint.sh train --preset demo --data data --run runs/mine train.steps=500`
Run the same command again after an interruption: it goes on from the last checkpoint, to the same weights.
"""

import math
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from tongkuan.checkpoint import ModelCard, Run, save_model
from tongkuan.config import Settings, TrainSettings
from tongkuan.data import Batch, ItemStore, augment, build_tokenizer, normalised, open_store, prefetch
from tongkuan.distributed import Ranks, ranks
from tongkuan.encode import autocast, distinct_items, encode, length_batches, one_thread_each, scores_of
from tongkuan.evaluate import labels_of
from tongkuan.files import UserError, check_writable, publish
from tongkuan.metrics import average_precision, best_threshold, quality_at
from tongkuan.model import TwoTowers, build, checkpoint_activations, pair_logits, text_config_of, whiten_head
from tongkuan.records import Pair, item_file, item_text, pair_file, read_items, read_pairs

WHITEN_BATCHES = 24  # of encode_batch items: more than any head is wide, and quick


@dataclass(frozen=True, slots=True)
class Task:
    """What there is to learn from and to validate on."""

    train_pairs: list[Pair]
    train_store: ItemStore
    valid_pairs: list[Pair]
    valid_store: ItemStore
    card: ModelCard
    """Settings, tokenizer and text configuration of the model to be."""


def load_task(settings: Settings, data_dir: Path) -> Task:
    """Read and check both splits before anything costs time."""
    items, pairs = {}, {}
    for split in ("train", "valid"):
        path = item_file(data_dir, split)
        items[split] = read_items(path)
        pairs[split] = read_pairs(pair_file(data_dir, split), items[split], items_path=path)
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
    return Task(pairs["train"], stores[0], pairs["valid"], stores[1], card)


def learning_rate_at(step: int, peak: float, settings: TrainSettings) -> float:
    """Cosine from `peak` at step 0 to final_learning_rate at the last, under a linear rise of warmup_steps."""
    final = min(settings.final_learning_rate, peak)
    cosine = final + (peak - final) * (1 + math.cos(math.pi * step / settings.steps)) / 2
    return cosine * min(1.0, (step + 1) / (settings.warmup_steps + 1))


def global_batch(step: int, num_pairs: int, settings: TrainSettings) -> list[int]:
    """Indices of the pairs of a step over all ranks: epochs of seeded permutations, end to end, nothing left out."""
    first = step * settings.pairs
    indices = []
    for position in range(first, first + settings.pairs):
        epoch, place = divmod(position, num_pairs)
        indices.append((epoch, place))
    orders = {epoch: np.random.default_rng((settings.seed, epoch)).permutation(num_pairs) for epoch, _ in indices}
    return [int(orders[epoch][place]) for epoch, place in indices]


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's forward: pairs, and the rows of their items in the global batch of 2 x pairs items."""

    step: int
    pairs: list[Pair]
    rows: list[int]


def parts(task: Task, settings: TrainSettings, fellows: Ranks, first_step: int) -> Iterator[Part]:
    """Every forward of this rank from `first_step` on, `accumulate` of them a step."""
    size = settings.pairs // (fellows.count * settings.accumulate)
    for step in range(first_step, settings.steps):
        chosen = global_batch(step, len(task.train_pairs), settings)
        for number in range(settings.accumulate):
            start = (fellows.rank * settings.accumulate + number) * size
            places = range(start, start + size)
            rows = [*places, *(settings.pairs + place for place in places)]  # left items, then right items
            yield Part(step, [task.train_pairs[chosen[place]] for place in places], rows)


Loaded = tuple[Part, Batch, Tensor]


def validate(model: TwoTowers, task: Task, settings: Settings, fellows: Ranks, run: Run, step: int) -> None:
    """Choose the threshold on the validation pairs, log, and keep the model if it is the best so far."""
    model.eval()
    item_ids = distinct_items(task.valid_pairs)
    embeddings = encode(model, task.valid_store, item_ids, settings.data, fellows, settings.train.precision, "validate")
    model.train()
    scores, labels = scores_of(task.valid_pairs, embeddings), labels_of(task.valid_pairs)
    threshold, f1 = best_threshold(scores, labels)
    at_zero, precision = quality_at(scores, labels, 0.0).f1, average_precision(scores, labels)
    figures = {"valid_f1": f1, "threshold": threshold, "valid_f1_at_0": at_zero, "valid_average_precision": precision}
    run.log(step, figures)
    if not fellows.is_first:
        return
    is_best = f1 > run.best_f1
    kept = ", best so far" if is_best else ""
    tqdm.write(f"step {step}: valid F1 {f1:.4f} at {threshold:.4f}, {at_zero:.4f} at 0{kept}")
    if is_best:
        run.best_f1 = f1
        facts = {"step": step, **figures, "train": settings.train.model_dump(mode="json")}
        card = ModelCard(settings.model, threshold, task.card.text_config, task.card.tokenizer, facts)
        save_model(run.best, model, card)


def make_optimizer(model: TwoTowers, settings: TrainSettings) -> torch.optim.Adam:
    """Adam with the encoders in one group and the two linear layers in another."""
    head = {id(p) for tower in (model.threshold, model.commodity) for p in tower.head.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in head], "peak": settings.learning_rate},
        {
            "params": [p for p in model.parameters() if id(p) in head],
            "peak": settings.head_learning_rate or settings.learning_rate,
        },
    ]
    return torch.optim.Adam(
        groups, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, foreach=True
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
    for folder in (run_dir, model_path.parent):
        check_writable(folder)
    task = load_task(settings, data_dir)
    with ranks() as fellows:
        check_batch(settings.train, fellows)
        torch.manual_seed(settings.train.seed)
        model = build(settings.model, task.card.text_config, pretrained=True).to(fellows.device)
        if settings.train.checkpoint_activations:
            checkpoint_activations(model)
        run = Run(run_dir, settings, fellows)
        if settings.train.whiten and not run.last.exists():
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
            print(f"{model_path}: best of {settings.train.steps} steps, valid F1 {run.best_f1:.4f}")
            print(f"next: ./entrypoint.sh predict --data {data_dir} --model {model_path}")


def whiten(model: TwoTowers, task: Task, settings: Settings, fellows: Ranks) -> None:
    """whiten_head of both towers on the first training items by id; the same on every rank."""
    item_ids = distinct_items(task.train_pairs)
    chosen = sorted(item_ids)[: settings.data.encode_batch * WHITEN_BATCHES]
    model.eval()
    with one_thread_each(), torch.no_grad():
        features: list[list[Tensor]] = [[], []]
        for item_batch in length_batches(task.train_store, chosen, settings.data.encode_batch):
            batch = task.train_store.batch(item_batch).to(fellows.device)
            images = normalised(batch, settings.model.image)
            for found, tower in zip(features, (model.threshold, model.commodity), strict=True):
                found.append(tower.features(images, batch.ids, batch.mask).cpu())
        for found, tower in zip(features, (model.threshold, model.commodity), strict=True):
            whiten_head(tower.head, torch.cat(found))


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

    def step(self, step: int, loaded: Iterator[Loaded]) -> tuple[Tensor, Tensor]:
        """One optimiser step on the next `accumulate` parts: (this rank's mean loss, gradient norm before clipping)."""
        options = self.settings.train
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, group["peak"], options)
        self.optimizer.zero_grad(set_to_none=True)
        mean_loss = torch.zeros((), device=self.device)
        for number in range(options.accumulate):
            part, batch, labels = next(loaded)
            with gradient_exchange(self.wrapped, is_last=number == options.accumulate - 1):
                loss = self.part_loss(part, batch.to(self.device), labels.to(self.device)) / options.accumulate
                self.scaler.scale(loss).backward()
            mean_loss += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return mean_loss, norm

    def part_loss(self, part: Part, batch: Batch, labels: Tensor) -> Tensor:
        """Mean cross-entropy of a part's pairs; both sides go through the (wrapped) model in one forward."""
        options = self.settings.train
        images = normalised(batch, self.settings.model.image)
        images, mask = augment(
            images, batch.mask, options.augmentation, options.seed, part.step, part.rows, 2 * options.pairs
        )
        with autocast(self.device, options.precision):
            embeddings = self.wrapped(images, batch.ids, mask)  # (2B, 2D)
        left, right = embeddings.float().chunk(2)
        return nn.functional.cross_entropy(pair_logits(left, right), labels)


def learn(model: TwoTowers, task: Task, settings: Settings, fellows: Ranks, run: Run) -> None:
    """The training loop: data, step, log, validate, save."""
    options = settings.train
    learner = Learner(model, settings, fellows)
    done = run.resume(model, learner.optimizer, learner.scaler)
    model.train()

    def load(part: Part) -> Loaded:
        item_ids = [pair.left for pair in part.pairs] + [pair.right for pair in part.pairs]
        return part, task.train_store.batch(item_ids), torch.from_numpy(labels_of(part.pairs))

    loaded = prefetch(parts(task, options, fellows, done), load, settings.data.workers)
    losses: list[Tensor] = []
    pairs = options.pairs
    quiet = None if fellows.is_first else True
    with tqdm(total=options.steps * pairs, initial=done * pairs, desc="train", unit="pair", disable=quiet) as progress:
        for step in range(done, options.steps):
            loss, norm = learner.step(step, loaded)
            losses.append(loss)
            progress.update(pairs)
            finished, is_last = step + 1, step + 1 == options.steps
            if finished % options.log_every == 0 or is_last:
                mean = float(np.mean(fellows.gather(float(torch.stack(losses).mean()))))
                losses.clear()
                if not math.isfinite(mean):
                    raise RuntimeError(f"loss is {mean} at step {finished}; {run.last} is the last good state")
                rate = learner.optimizer.param_groups[0]["lr"]
                figures = {"loss": mean, "gradient_norm": float(norm), "learning_rate": rate}
                run.log(finished, figures, progress.format_dict["rate"])
                progress.set_postfix(loss=f"{mean:.4f}")
            if finished % options.validate_every == 0 or is_last:
                validate(model, task, settings, fellows, run, finished)
            if finished % options.save_every == 0 or is_last:
                run.save(finished, model, learner.optimizer, learner.scaler)


def gradient_exchange(model: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """Ranks exchange gradients once a step, in the backward of its last part."""
    if isinstance(model, DistributedDataParallel) and not is_last:
        return cast(AbstractContextManager[None], model.no_sync())
    return nullcontext()
