"""The suite of short training runs: same seed, same start, and when two backends count as equal."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the models need the extra 'examples'")

from benchmarks import harness, plot, training
from benchmarks.harness import Row

CONFIG = replace(training.smoke(training.Config(device="cpu", threads=1)), models=("tiny",), batch=8, steps=30)


def test_a_smoke_run_trains_all_but_the_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = training.Config(device="cpu", threads=1, smoke=True, out=tmp_path)
    returned = training.main(config)
    rows = harness.read_rows(tmp_path / "training.jsonl")
    assert rows == returned
    assert [(r["seed"], r["name"], r["backend"]) for r in rows] == [(s, *run) for s in (0, 1) for run in training.RUNS]
    for row in rows:
        if row["backend"] == "triton":
            assert "GPU" in row["skipped"] and "losses" not in row
        else:
            assert row["skipped"] is None and len(row["losses"]) == row["steps"] and row["median_ms"] > 0
            assert all(map(math.isfinite, row["losses"]))
    assert ["dydi-lit", "torch"] in [line.split()[2:4] for line in capsys.readouterr().out.splitlines()]
    assert [picture.name for picture in plot.draw_all(rows, tmp_path)] == ["training.png"]


def test_a_run_learns_and_repeats() -> None:
    first, again = (training.train(CONFIG, "tiny", 0, "dydi-lit", "torch")["losses"] for _ in range(2))
    other = training.train(CONFIG, "tiny", 1, "dydi-lit", "torch")["losses"]
    assert first == again != other
    assert sum(first[-5:]) < 0.9 * sum(first[:5])


def test_latents_are_enlarged_digits() -> None:
    images, labels = training.latents(32)
    assert images.shape == (len(labels), 4, 32, 32) and set(labels.tolist()) == set(range(10))
    assert images.std() == pytest.approx(1, abs=0.2) and images.mean().abs() < 0.5
    assert torch.equal(images[:, 0], -images[:, 1])


@pytest.mark.parametrize(
    ("triton", "verdict"), [((1.0, 1.2), None), ((1.05, 1.1), None), ((1.4, 0.8), "wrong"), ((math.nan, 1.2), "wrong")]
)
def test_backends_may_differ_as_seeds_do(triton: tuple[float, float], verdict: str | None) -> None:
    """The torch backend's seeds end 0.2 apart."""

    def row(backend: str | None, seed: int, loss: float) -> Row:
        return {"backend": backend, "seed": seed, "skipped": None, "losses": [9.0] * 30 + [loss] * 10}

    rows = [
        row("torch", 0, 1.0),
        row("torch", 1, 1.2),
        row(None, 0, 7.0),
        *(row("triton", i, triton[i]) for i in (0, 1)),
    ]
    training.compare(rows[:-1])
    assert not any("difference" in r for r in rows)
    training.compare(rows)
    assert rows[-1]["spread"] == pytest.approx(0.2)
    assert (rows[-1]["skipped"] or "").startswith(verdict or "") and bool(rows[-1]["skipped"]) == bool(verdict)


def test_one_seed_says_nothing() -> None:
    with pytest.raises(ValueError, match=r"seeds must be two different ones at least; got \(3, 3\)"):
        training.main(training.Config(device="cpu", seeds=(3, 3)))
