"""The suite of sampling steps, called and captured."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the models need the extra 'examples'")

from benchmarks import harness, latency, model, suite
from benchmarks.model import Case, network


def case(device: str = "cpu", fused: bool = True) -> Case:
    return Case("dydi-lit", "tiny", "forward", 2, 256, device, torch.float32, fused)


def test_a_smoke_run_measures_a_step_with_and_without_guidance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    returned = latency.main(latency.Config(device="cpu", smoke=True, threads=1, out=tmp_path))
    rows = harness.read_rows(tmp_path / "latency.jsonl")
    assert rows == returned and suite.exit_code(rows) == 0
    cells = [(row["name"], row["batch"], row["image"]) for row in rows]
    assert sorted(cells) == sorted(
        (name, batch, image) for name in ("dydi-lit", "sana", "dit") for batch in (1, 2) for image in (64, 256)
    )
    for row in rows:
        assert row["skipped"] is None and row["mode"] == "forward" and row["fused"] == (row["name"] == "dydi-lit")
        assert 0 < row["q10_ms"] <= row["median_ms"] <= row["q90_ms"]
        assert (
            row["error_ratio"] <= 2 if row["fused"] else "error_ratio" not in row
        )  # a rival has nothing captured here
    assert any(line.startswith("batch=2 tokens=256 image=256") for line in capsys.readouterr().out.splitlines())


def test_a_step_of_the_fused_model_is_that_of_the_model() -> None:
    outputs = []
    for fused in (True, False):
        network("dydi-lit", "tiny", False, fused, "cpu", torch.float32)  # which seeds what it makes, once
        torch.manual_seed(1)
        outputs.append(model.prepare(case(fused=fused))())
    assert outputs[0].shape == (2, 8, 32, 32) and outputs[0].any()
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
    assert network("dydi-lit", "tiny", False, True, "cpu", torch.float32).blocks[0].attention.fused


def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "fused_error_ratio", lambda _: math.nan)
    rows = latency.main(latency.Config(device="cpu", smoke=True, threads=1, batches=(1,)))
    assert {row["name"] for row in rows if row["skipped"] == suite.WRONG} == {"dydi-lit"}


def test_the_table_shows_both_times_and_why_there_is_none() -> None:
    row = {"name": "dit", "batch": 1, "image": 256, "skipped": None, "median_ms": 2.0}
    other = {**row, "image": 512, "skipped": "out of memory"}
    text = suite.report([{**row, "graph_median_ms": 0.5}, {**row, "image": 64}, other])
    times = [re.split(r"  +", line)[1] for line in text.splitlines()[1:]]
    assert times == ["dit", "0.5, called 2", "2", "out of memory"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fused", [False, True])
def test_a_captured_step_is_the_step(fused: bool) -> None:
    assert latency.captured_difference(case("cuda", fused)) <= 2
