"""Train the two towers: by steps, on one rank or many, exactly resumable; the best model lands in `weights/`.

`./entrypoint.sh train --preset demo --data data --run runs/mine train.steps=500`
Run the same command again after an interruption: it goes on from the last checkpoint, to the same weights.
"""

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tongkuan.base.errors import FailureError, UserError, clip, entrypoint
from tongkuan.base.files import check_target, check_writable, publish
from tongkuan.base.machine import keep_freed_memory
from tongkuan.base.metrics import average_precision, best_threshold, quality_at
from tongkuan.encode.encode import (
    batch_size,
    chosen_precision,
    distinct_items,
    encode,
    length_batches,
    one_thread_each,
    scores_of,
)
from tongkuan.encode.store import ItemStore, normalised
from tongkuan.learn.batches import BatchSampler
from tongkuan.learn.dataloader import Task, facts_of, load_parts, load_task
from tongkuan.learn.features import FeatureStore, features_of
from tongkuan.learn.fit import fit
from tongkuan.learn.run import Run, check_same
from tongkuan.learn.step import TrainStep
from tongkuan.model.blocks import freeze
from tongkuan.model.modelfile import ModelCard, save_model
from tongkuan.model.one import OneTower
from tongkuan.model.towers import SharedTowers, TwoTowers, build, checkpoint_activations, whiten_head
from tongkuan.model.trunk import ItemModel, Trunk
from tongkuan.ranks.group import Ranks, join_ranks
from tongkuan.ranks.stop import StopRequests
from tongkuan.records.labels import labels_of
from tongkuan.settings import Settings, TrainSettings

WHITEN_ITEMS = 768  # enough to know their spread by, and quick
WHITEN_NORMS = (0.3, 3.0)  # of the threshold and the commodity tower's embeddings


def train(settings: Settings, data_dir: Path, run_dir: Path, model_path: Path) -> None:
    """Train to settings.train.steps, resuming what `run_dir` holds, and publish the best model at `model_path`."""
    check_writable(run_dir)
    check_target(model_path)
    with open_training(settings, data_dir) as (settings, task, model, ranks):
        trainer = Trainer(settings, task, model, ranks, Run(run_dir, settings, ranks))
        trainer.fit()
        if not ranks.is_first:
            return
        with publish(model_path) as file, trainer.run.best.open("rb") as source:
            shutil.copyfileobj(source, file)
        for store in (task.train_store, task.valid_store):
            if warning := store.warning():
                print(warning)
        kept = "the last" if task.is_undecided else "best"
        figure = "threshold 0, none chosen" if task.is_undecided else f"valid F1 {trainer.run.best_f1:.4f}"
        print(f"{model_path}: {kept} of {settings.train.steps} steps, {figure}")
        print(f"next: {entrypoint('predict', '--data', data_dir, '--model', model_path)}")


@contextmanager
def open_training(settings: Settings, data_dir: Path) -> Iterator[tuple[Settings, Task, ItemModel, Ranks]]:
    """The settings with the precision chosen, what there is to learn, and the network before its first step."""
    task, options = load_task(settings, data_dir), settings.train
    with join_ranks() as ranks:
        check_batch(options, ranks)
        check_same(facts_of(task, settings), ranks)
        chosen = chosen_precision(options.precision, ranks)
        if options.precision is None and chosen != "fp32" and ranks.is_first:
            print(f"train.precision={chosen}, which the GPU multiplies; evaluate says what it costs", flush=True)
        options = options.model_copy(update={"precision": chosen})
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        model = build(settings.model, task.card.text_config, pretrained=True).to(ranks.device)
        freeze(model, options)
        if options.checkpoint_activations:
            checkpoint_activations(model)
        yield settings.model_copy(update={"train": options}), task, model, ranks


def check_batch(settings: TrainSettings, ranks: Ranks) -> None:
    """UserError when the global batch cannot be dealt evenly, or not be learned from in the way asked for."""
    share = ranks.world_size * settings.accumulate
    if settings.pairs % share:
        raise UserError(
            f"train.pairs={settings.pairs} over {ranks.world_size} ranks x {settings.accumulate} parts is uneven; "
            f"make it a multiple of {share}"
        )
    if settings.cuda_graphs and (settings.accumulate > 1 or settings.checkpoint_activations):
        other = "accumulate" if settings.accumulate > 1 else "checkpoint_activations"
        raise UserError(
            f"train.cuda_graphs=true cannot be together with train.{other}={getattr(settings, other)}; leave one of "
            "them out"
        )


class Trainer:
    """The training loop of one rank: steps, rows, validations, checkpoints."""

    def __init__(self, settings: Settings, task: Task, model: ItemModel, ranks: Ranks, run: Run) -> None:
        self.settings, self.options = settings, settings.train
        self.task, self.model, self.ranks, self.run = task, model, ranks, run

    def fit(self) -> None:
        """Take all steps that are left, or those up to a request to stop; every rank takes part."""
        options, run, ranks = self.options, self.run, self.ranks
        is_new = run.is_new
        raw = self.start() if is_new else None
        torch.manual_seed(options.seed + 1 + ranks.rank)  # dropout differs from rank to rank
        keep_freed_memory(ranks.device)
        step = TrainStep(self.model, self.settings, ranks)
        if ranks.is_first and (lines := [*self.task.notes, *self.task.train_store.coverage()]):
            print("\n".join(lines), flush=True)
        done = run.resume(self.model, step.optimizer, step.scaler)
        if done and ranks.is_first:
            run.write_metrics()  # killed just after last.pt, a run that is done would never write them
        if run.owes_validation:
            self.validate(done)
            run.save(done, self.model, step.optimizer, step.scaler)
        store = self.store(done, raw)
        self.model.train()
        if ranks.world_size > 1 and done < options.steps:
            with closing(load_parts(self.task, self.settings, ranks, 0, store)) as first:
                step.join(next(first))
        with StopRequests(ranks) as requests, self.progress(done) as progress:
            loaded = load_parts(self.task, self.settings, ranks, done, store)
            step.take_times()
            for number in range(done + 1, options.steps + 1):
                loss, norm = step.take(number - 1, loaded)
                run.losses.append(loss)
                progress.update(options.pairs)
                is_stopped = requests.after(number)
                is_row, is_validated, is_saved = self.due(number)
                if is_row or is_validated or is_saved or is_stopped:  # before a state that is none is kept
                    figures = self.figures(number, step, norm)
                if is_row:
                    self.log_row(number, figures, step, progress)
                with step.clock_stopped():
                    if is_validated and not is_stopped:
                        self.validate(number)
                    if is_saved or is_stopped:
                        owes = is_validated and is_stopped
                        run.save(number, self.model, step.optimizer, step.scaler, owes)
                if is_stopped:
                    break
        if is_new and not options.steps:
            self.validate(0)
            run.save(0, self.model, step.optimizer, step.scaler)
        run.close()

    def progress(self, done: int) -> "tqdm[Any]":
        """The bar, in pairs."""
        pairs, total = self.options.pairs, self.options.steps
        quiet = None if self.ranks.is_first else True
        return tqdm(total=total * pairs, initial=done * pairs, desc="train", unit="pair", disable=quiet)

    def due(self, number: int) -> tuple[bool, bool, bool]:
        """Whether a row, a validation and a checkpoint are due after step `number` from 1."""
        options, is_last = self.options, number == self.options.steps
        row, validate, save = (
            number % every == 0 or is_last for every in (options.log_every, options.validate_every, options.save_every)
        )
        return row, validate, save

    def figures(self, number: int, step: TrainStep, norm: Tensor) -> dict[str, float]:
        """What a row holds. FailureError when the loss or the gradient is no number: no such state is to be kept."""
        run = self.run
        mean = float(np.mean(self.ranks.gather(float(torch.stack(run.losses).mean()))))
        size = float(norm)
        if not math.isfinite(mean) or not (math.isfinite(size) or step.scaler.is_enabled()):
            raise FailureError(self.not_a_number(number))
        return {"loss": mean, "gradient_norm": size, "learning_rate": step.optimizer.param_groups[0]["lr"]}

    def log_row(self, number: int, figures: dict[str, float], step: TrainStep, progress: "tqdm[Any]") -> None:
        """Log what was learned since the last row, and begin the next."""
        self.run.losses.clear()
        speed, wait = step.take_times()
        self.run.log(number, figures, {"pairs_per_second": speed, "data_wait_seconds": wait})
        progress.set_postfix(loss=f"{figures['loss']:.4f}", data_wait=f"{1000 * wait:.1f} ms")

    def not_a_number(self, number: int) -> str:
        """A line on the first step since the last row whose loss, or the last step whose gradient, is no number.

        Found when something is to be kept: looking at each step's loss would have the host wait for the device.
        """
        by_rank = np.array(self.ranks.gather([float(loss) for loss in self.run.losses]))  # (ranks, steps)
        lost = np.flatnonzero(~np.isfinite(by_rank).all(axis=0))
        step = number - by_rank.shape[1] + int(lost[0]) if len(lost) else number - 1
        what = "loss" if len(lost) else "gradient"
        batch = BatchSampler(self.task.train_pairs, self.options).batch(step)
        pairs = ", ".join(f"{pair.left}-{pair.right}" for pair in batch[:8])
        last = self.run.last
        has_state = self.ranks.from_first(last.exists)
        state = f"{last} is the last good state" if has_state else "there is no checkpoint yet"
        return (
            f"the {what} of step {step + 1} is not a number (pairs {clip(pairs, 300)}); {state}: look at these pairs, "
            "or lower train.learning_rate or train.clip_norm"
        )

    def validate(self, step: int) -> None:
        """Choose the threshold on the validation pairs, log, and keep the model if it is the best so far.

        Pairs of one label choose nothing: any F1 there is reached by calling all pairs alike. The newest model is kept.
        """
        task, settings, run = self.task, self.settings, self.run
        item_ids, precision = distinct_items(task.valid_pairs), chosen_precision(self.options.precision, self.ranks)
        self.model.eval()
        embeddings = encode(self.model, task.valid_store, item_ids, settings.data, self.ranks, precision, "validate")
        self.model.train()
        scores, labels = scores_of(task.valid_pairs, embeddings), labels_of(task.valid_pairs)
        at_zero, area = quality_at(scores, labels, 0.0).f1, average_precision(scores, labels)
        threshold, f1 = (0.0, at_zero) if task.is_undecided else best_threshold(scores, labels)
        figures = {"valid_f1": f1, "threshold": threshold, "valid_f1_at_0": at_zero, "valid_average_precision": area}
        run.log(step, figures)
        if not self.ranks.is_first:
            return
        is_kept = task.is_undecided or f1 > run.best_f1
        if task.is_undecided:
            right = np.mean((scores > 0) == (labels == 1))
            tqdm.write(f"step {step}: {right:.1%} of the valid pairs, all of label {labels[0]}, are right at 0; kept")
        else:
            kept = ", best so far" if is_kept else ""
            tqdm.write(f"step {step}: valid F1 {f1:.4f} at {threshold:.4f}, {at_zero:.4f} at 0{kept}")
        if is_kept:
            run.best_f1 = f1
            facts = {"step": step, **figures, "train": self.options.model_dump(mode="json")}
            card = ModelCard(settings.model, threshold, task.card.text_config, task.card.tokenizer, facts)
            save_model(run.best, self.model, card)

    def store(self, done: int, raw: dict[str, Tensor] | None) -> ItemStore | FeatureStore:
        """Where steps find the training items; by their features, `raw` or new ones, where encoders are asked once."""
        task, options = self.task, self.options
        if not options.reuses_features or done >= options.steps:
            return task.train_store
        item_ids = distinct_items(task.train_pairs)
        if raw is None:
            raw = features_of(self.model, task.train_store, item_ids, self.settings.data, self.ranks)
        return FeatureStore(task.train_store, item_ids, raw)

    def start(self) -> dict[str, Tensor] | None:
        """Set what is set before the first step, from the training items; the same on every rank.

        Their raw features, where they were computed for it and steps go on from them.
        """
        model, store, data = self.model, self.task.train_store, self.settings.data
        if isinstance(model, OneTower):
            raw = features_of(model, store, distinct_items(self.task.train_pairs), data, self.ranks)
            fit(model, store, self.task.train_pairs, raw, self.ranks)
            return raw if self.options.reuses_features else None
        if self.options.whiten:
            assert isinstance(model, TwoTowers | SharedTowers)
            model.eval()
            chosen = sorted(distinct_items(self.task.train_pairs))[:WHITEN_ITEMS]
            batches = length_batches(store, chosen, batch_size(data, self.settings.model, self.ranks.device))
            features = self.features(list(dict.fromkeys(trunk for trunk, _ in model.heads())), batches)
            # Two like towers would cancel out. So scores start as likeness (q.q), and thresholds (p.p) near 0.
            for (trunk, head), norm in zip(model.heads(), WHITEN_NORMS, strict=True):
                whiten_head(head, features[trunk], norm)
        return None

    def features(self, trunks: Sequence[Trunk], batches: Sequence[Sequence[str]]) -> dict[Trunk, Tensor]:
        """What each trunk says of the items in batches, float (items, width)."""
        found: dict[Trunk, list[Tensor]] = {trunk: [] for trunk in trunks}
        with one_thread_each(), torch.no_grad():
            for item_batch in batches:
                batch = self.task.train_store.batch(item_batch).to(self.ranks.device)
                images = normalised(batch, self.settings.model.image)
                for trunk, rows in found.items():
                    rows.append(trunk.features(images, batch.ids, batch.attended).cpu())
        return {trunk: torch.cat(rows) for trunk, rows in found.items()}
