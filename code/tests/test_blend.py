"""--blend: items move towards their nearest neighbours, and the threshold that holds then is asked for."""

import shlex
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tongkuan.base.errors import UserError
from tongkuan.cli.verbs import main
from tongkuan.encode.blend import LEAST, NEIGHBOURS, blend


def by_loops(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """The same in float64, an item at a time."""
    found = rows.astype(np.float64)
    half = rows.shape[1] // 2
    norms = np.linalg.norm(found[:, half:], axis=1)
    units = found[:, half:] / norms[:, None]
    for place, unit in enumerate(units):
        likeness = sorted((float(unit @ units[other]), other) for other in range(len(rows)) if other != place)
        total = unit + sum((c * units[other] for c, other in likeness[-NEIGHBOURS:] if c >= LEAST), np.zeros(half))
        found[place, half:] = norms[place] * total / np.linalg.norm(total)
    return found


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_q_turns_to_its_nearest_neighbours_and_keeps_its_norm(items: int, seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(items, 6)).astype(np.float32)
    found = blend({str(place): row for place, row in enumerate(rows)})
    assert [*found] == [str(place) for place in range(items)]
    assert np.stack([*found.values()]) == pytest.approx(by_loops(rows), abs=1e-4)
    assert np.stack([*found.values()]).dtype == np.float32


def test_blocks_change_nothing_but_last_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    named = {str(place): row for place, row in enumerate(rows)}
    whole = blend(named)
    monkeypatch.setattr("tongkuan.encode.blend.BLOCK", 7)
    assert np.stack([*blend(named).values()]) == pytest.approx(np.stack([*whole.values()]), abs=1e-6)


def test_an_item_of_zeros_and_one_without_neighbours_stay() -> None:
    rows = np.array([[1, 2, 0, 0], [1, 2, 1, 0], [1, 2, 0, 1]], dtype=np.float32)
    assert np.array_equal(np.stack([*blend({str(place): row for place, row in enumerate(rows)}).values()]), rows)


def test_the_threshold_that_evaluate_finds_is_the_one_to_predict_with_and_verify_blends_too(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = ["--data", str(data), "--model", str(model)]
    with pytest.raises(UserError, match="evaluate") as refused:
        main(["predict", *inputs, "--blend", "--submit", str(tmp_path)])
    words = str(refused.value).partition("./entrypoint.sh ")[2].partition(",")[0]
    capsys.readouterr()
    main(shlex.split(words))
    advice = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next: "))
    assert "--blend" in advice and "--threshold" in advice
    for submit, extra in (("plain", []), ("blended", ["--blend"])):
        threshold = advice.split()[-1]
        main(["predict", *inputs, "--submit", str(tmp_path / submit), "--threshold", threshold, *extra])
    results = [(tmp_path / submit / "result.jsonl").read_bytes() for submit in ("plain", "blended")]
    assert results[0] != results[1]
    said = [orjson.loads((tmp_path / submit / "manifest.json").read_bytes()) for submit in ("plain", "blended")]
    assert said[1]["blended"] is True and "blended" not in said[0]
    main(["verify", *inputs, "--submit", str(tmp_path / "blended")])
    assert "rebuilt to the byte" in capsys.readouterr().out
