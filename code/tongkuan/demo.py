"""The whole job on a sample catalogue, in a folder of its own: every step is a verb that you could type.

`./entrypoint.sh demo` and, for text alone and pictures alone beside both, `./entrypoint.sh demo --ablation`.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tongkuan.base.errors import entrypoint
from tongkuan.base.files import check_writable
from tongkuan.judge.check import score
from tongkuan.match.score import match_score
from tongkuan.ranks.place import num_ranks

Verb = Callable[[Sequence[str]], int]
RANKS = 2  # without a GPU: small operators gain nothing from a second thread, a second rank halves the time
INPUTS = {"both": "text and picture", "text": "text alone", "image": "picture alone"}


def demo(
    run_dir: Path,
    overrides: Sequence[str],
    with_ablation: bool,
    nproc: int | None,
    products: int | None,
    run_verb: Verb,
) -> None:
    """sample, resize, split, train, predict, check, score, plot, report and match, in `run_dir`; prints each."""
    if nproc is not None:
        num_ranks(nproc)  # refused now rather than by a step of it
    started = time.monotonic()
    for name in ("raw", "data", "train", "weights", "submit", "match"):
        check_writable(run_dir / name)
    raw, data = run_dir / "raw", run_dir / "data"
    ranks = ["--nproc", str(nproc or torch.cuda.device_count() or RANKS)]

    def announce(*words: object) -> list[str]:
        command = [str(word) for word in words]
        print(f"\n[{time.monotonic() - started:4.0f} s] {entrypoint(*words)}", flush=True)
        return command

    def step(*words: object) -> None:
        if code := run_verb(announce(*words)):
            sys.exit(code)

    step("sample", "--raw", raw, *(() if products is None else ("--products", products)))
    step("resize", "--raw", raw, "--data", data, "--size", 96)  # the demo preset looks at 16 x 16
    step("split", "--data", data)
    answers = data / "item_test_answers.jsonl"
    figures = {}
    for inputs in INPUTS if with_ablation else ("both",):
        folder = run_dir if inputs == "both" else run_dir / inputs
        model, submit = folder / "weights" / "model.safetensors", folder / "submit"
        settings = [*overrides, f"model.inputs={inputs}"]
        step(
            "train", "--preset", "demo", "--data", data, "--run", folder / "train", "--model", model, *ranks, *settings
        )
        step("predict", "--data", data, "--model", model, "--submit", submit, *ranks)
        step("check", "--submit", submit, "--pairs", data / "item_test_pair.jsonl")
        announce("score", "--submit", submit, "--pairs", answers)
        figures[INPUTS[inputs]] = score(submit, answers)
        step("plot", "--submit", submit, "--pairs", answers)
        step("report", "--submit", submit, "--pairs", answers, "--data", data, "--run", folder / "train")
    catalogue = run_dir / "match"
    step(
        "match", "run", "--data", data, "--model", run_dir / "weights" / "model.safetensors", "--out", catalogue, *ranks
    )
    announce("match", "score", "--out", catalogue, "--pairs", answers)
    groups = match_score(catalogue, answers)
    print(f"\ndone in {time.monotonic() - started:.0f} s; F1 on products never trained on:")
    for name, f1 in figures.items():
        print(f"  {name:<18}{f1:.4f}")
    print(f"  groups of all     {groups:.4f}")
    pages = f"{run_dir / 'submit' / 'report.html'} and {catalogue / 'report.html'}"
    print(f"next: open {pages} in a browser")
