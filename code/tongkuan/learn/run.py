"""A run folder: the state to go on from, saved whole or not at all, the best model, and the curves."""

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import torch
from torch import Tensor, nn

from tongkuan.base.errors import UserError, clip
from tongkuan.base.files import publish
from tongkuan.ranks.group import Ranks
from tongkuan.settings import Settings

STATE = {"settings", "step", "model", "optimizer", "scaler", "rng", "losses", "best_f1", "metrics"}  # of last.pt


class Run:
    """A run folder: last.pt to resume from, best.safetensors, metrics.jsonl and TensorBoard curves."""

    def __init__(self, run_dir: Path, settings: Settings, ranks: Ranks) -> None:
        self.run_dir, self.settings, self.ranks = run_dir, settings, ranks
        self.best_f1 = -1.0
        self.metrics: list[dict[str, Any]] = []
        self.losses: list[Tensor] = []  # this rank's since the last row, on its device
        self.last, self.previous = run_dir / "last.pt", run_dir / "previous.pt"
        self.best = run_dir / "best.safetensors"
        self.owes_validation = False
        """Whether the run was stopped when the model of its last step was to be validated."""
        self._board: Any = None
        self.is_new = ranks.from_first(lambda: not (self.last.exists() or self.previous.exists()))
        """Whether there was nothing to resume from: on rank 0, whose folder counts."""

    def newest(self) -> dict[str, Any] | None:
        """The last state that is whole, None for a new run. UserError when there are only damaged ones."""
        damaged: list[Path] = []
        for path in (self.last, self.previous):
            if path.exists():
                if (state := read_state(path, self.ranks.device.type == "cuda")) is not None:
                    if damaged:
                        print(f"{damaged[0]}: damaged; going on from {path}, step {state['step']}")
                    return state
                damaged.append(path)
        if damaged:
            files = " and ".join(map(str, damaged))
            raise UserError(f"{files}: damaged; delete to start the run anew")
        return None

    def fitting(self) -> dict[str, Any] | None:
        """`newest`, which is of these settings and ranks. UserError when it is of others."""
        state = self.newest()
        if state is None:
            return None
        if state["settings"] != self.described():
            different = ", ".join(sorted(differing(state["settings"], self.described())))
            raise UserError(f"{self.last}: a run of other settings ({different}); name another --run or delete it")
        if len(state["rng"]) != self.ranks.world_size:
            raise UserError(
                f"{self.last}: a run on {len(state['rng'])} ranks; go on with as many, or name another --run"
            )
        return state

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> int:
        """Restore everything from rank 0's last.pt, on every rank; the number of steps done, 0 for a new run."""
        state = self.ranks.from_first(self.fitting)
        check_same({"step": state["step"] if state else 0}, self.ranks)
        if state is None:
            return 0
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        set_rng(state["rng"][self.ranks.rank], self.ranks.device)
        self.best_f1, self.metrics = state["best_f1"], state["metrics"]
        self.owes_validation = state.get("owes_validation", False)
        self.losses = [torch.tensor(loss, device=self.ranks.device) for loss in state["losses"][self.ranks.rank]]
        return int(state["step"])

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        owes_validation: bool = False,
    ) -> None:
        """Publish last.pt and metrics.jsonl; every rank takes part."""
        rng = self.ranks.gather(get_rng(self.ranks.device))
        losses = self.ranks.gather([float(loss) for loss in self.losses])
        if self.ranks.is_first:
            state = {
                "settings": self.described(),
                "step": step,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "rng": rng,
                "losses": losses,
                "best_f1": self.best_f1,
                "metrics": self.metrics,
                "owes_validation": owes_validation,
            }
            if self.last.exists():
                self.last.replace(self.previous)
            with publish(self.last) as file:
                torch.save(state, file)
            self.write_metrics()
        self.ranks.wait()

    def write_metrics(self) -> None:
        """Publish the rows logged so far."""
        with publish(self.run_dir / "metrics.jsonl") as file:
            file.writelines(orjson.dumps(row) + b"\n" for row in self.metrics)

    def described(self) -> dict[str, Any]:
        """The settings that decide what is learned, as plain values."""
        return self.settings.model_dump(mode="json", include={"model", "train"})

    def log(self, step: int, figures: dict[str, float], clock: Mapping[str, float] | None = None) -> None:
        """Keep a row for metrics.jsonl and plot it, and plot `clock`, which no artefact holds; the first rank only."""
        if not self.ranks.is_first:
            return
        self.metrics.append({"step": step, **figures})
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=step)
        for name, value in {**figures, **(clock or {})}.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the curves."""
        if self._board is not None:
            self._board.close()


def read_state(path: Path, is_mapped: bool = False) -> dict[str, Any] | None:
    """What `Run.save` wrote, None when a byte of it is not as written; nothing in it is executed.

    `is_mapped`: its tensors stay in the file until they are copied, to a GPU. On a CPU the optimiser would keep those.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # as torch.save writes them, a checksum for every tensor
            if archive.testzip() is not None:
                return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, ValueError, EOFError, OSError):
        return None
    return state if isinstance(state, dict) and state.keys() >= STATE else None


def differing(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Names of settings that are not the same."""
    names = []
    for key in old.keys() | new.keys():
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += differing(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(f"{prefix}{key}")
    return names


def check_same(facts: dict[str, Any], ranks: Ranks) -> None:
    """UserError on every rank when one has other facts than rank 0, with which it would learn something else."""
    first, *others = ranks.gather(facts)
    for rank, facts_there in enumerate(others, 1):
        if names := differing(first, facts_there):
            raise UserError(
                f"rank {rank} differs from rank 0 in {clip(', '.join(sorted(names)), 200)[1:-1]}; start all ranks with "
                "the same command, on the same data"
            )


def get_rng(device: torch.device) -> list[Tensor]:
    """Generator states that dropout draws from."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_rng(states: Sequence[Tensor], device: torch.device) -> None:
    """The inverse of get_rng."""
    torch.set_rng_state(states[0].cpu())
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1].cpu(), device)
