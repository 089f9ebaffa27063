"""The suite of kernels beside their predictions, and that the predictions are of what a step launches today."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import harness, kernels, stages
from benchmarks.harness import Row
from benchmarks.offline.prediction import steps
from benchmarks.offline.prediction.steps import PREDICTIONS, SETTINGS, Setting
from tests import interpreter

needs_triton = pytest.mark.skipif(not interpreter.AVAILABLE, reason="Triton is not installed")
DEVICE = "NVIDIA H200"


@pytest.fixture(scope="module")
def launches() -> list[Row]:
    """Of a step on a GPU; what each launch is told apart by, with its setting and mode."""
    from tests.ops.test_offline import compiling

    script = """import json
from benchmarks.offline.prediction import __main__ as m
print(json.dumps([s._asdict() | {"mode": mode, **m.named(job)} for s in m.SETTINGS
                  for mode, jobs in m.launches(s).items() for job in jobs]))"""
    done = compiling("-c", script)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_triton
def test_what_is_predicted_is_what_a_step_launches(launches: list[Row]) -> None:
    """Else: python -m benchmarks.offline.prediction."""
    predictions = harness.read_rows(PREDICTIONS)
    assert [{key: row[key] for key in launches[0]} for row in predictions] == launches
    assert {row["kind"] for row in predictions} == {"prediction by a model, not a measurement"}
    assert all(row["fast_us"] <= row["slow_us"] and row["floor_us"] < row["slow_us"] for row in predictions)


@needs_triton
def test_every_kernel_belongs_to_a_stage(launches: list[Row]) -> None:
    known = {name for names in stages.KERNELS.values() for name in names}
    assert {row["kernel"] for row in launches} <= known


@needs_triton
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: steps.title(setting._asdict()))
def test_every_stage_is_found_in_a_step(setting: Setting, launches: list[Row]) -> None:
    """But for the convolution where the readout has it, and where there is none."""
    for mode in ("forward", "backward"):
        names = [row["kernel"] for row in launches if setting.has(row, mode)]
        spans = [("gemm", 0.0), *((name, 1.0) for name in names)]
        spans = [span for name, s in spans for span in ((name, s), ("gemm", 0.5))]
        expected = {"projection", "gradients"} if mode == "backward" else {*stages.KERNELS} - {"gradients"}
        fused = {"convolution"} if "readout_kernel" in names or not setting.convolution else set()
        assert all(stages.seconds_of(stage, spans) > 0 for stage in expected - fused)


@needs_triton
def test_questions_have_the_tables_of_the_predictions() -> None:
    from benchmarks.offline.prediction import __main__ as predicting

    page = predicting.QUESTIONS.read_text()
    assert predicting.written(page, harness.read_rows(PREDICTIONS)) == page
    with pytest.raises(ValueError, match="one place for the tables"):
        predicting.written("nothing", harness.read_rows(PREDICTIONS))


PREDICTED: Row = {
    "commit": "0123456", "predicted_us": 100.0, "fast_us": 80.0, "slow_us": 120.0, "floor_us": 50.0, "binds": "dram",
    "lower_bound": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("us", "change", "device", "verdict"),
    [
        (79, {}, DEVICE, "faster"),
        (80, {}, DEVICE, "within the spread"),
        (121, {}, DEVICE, "at most 1.4 above"),
        (141, {}, DEVICE, "slower"),
        (150, {"slow_us": 160.0}, DEVICE, "within the spread"),
        (141, {"lower_bound": True}, DEVICE, "above a lower bound"),
        (100, {}, "NVIDIA A100", "another device"),
    ],
)
def test_verdicts(us: float, change: Row, device: str, verdict: str) -> None:
    found = steps.compared(us, PREDICTED | change, device)
    assert found["verdict"] == verdict and found["predicted_for"] == "NVIDIA H200"
    assert found["predicted_us"] == 100 and found["predicted_commit"] == "0123456"


@pytest.mark.skipif(not interpreter.INTERPRETED, reason="the kernels need a GPU, or Triton's interpreter")
def test_a_step_in_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    config = kernels.Config(device="cpu", threads=1, smoke=True, out=tmp_path)
    rows = kernels.main(config)
    assert harness.read_rows(tmp_path / "kernels.jsonl") == rows
    names = steps.launched(Setting(1, 64, 32, 2), torch.float32)
    for mode in ("forward", "backward"):
        timed = [row["name"] for row in rows if row["mode"] == mode]
        assert [name for name in timed if name != "torch"] == names[mode]
    assert all(row["median_ms"] > 0 and row["clock"] == "marks" and row["error_ratio"] <= 2 for row in rows)
    assert {row.get("verdict") for row in rows if row["name"] != "torch"} == {"not predicted"}
    assert "B=1 N=64 d=32 H=2, backward" in capsys.readouterr().out

    # The same step, predicted; one launch of the backward pass is no longer there.
    predicted = [
        PREDICTED | Setting(1, 64, 32, 2)._asdict() | {"mode": mode, "kernel": name, "predicted_us": float(number)}
        for mode in names
        for number, name in enumerate(names[mode][mode == "backward" :], 1)
    ]
    harness.write_rows(tmp_path / "predictions.jsonl", predicted)
    monkeypatch.setattr(steps, "PREDICTIONS", tmp_path / "predictions.jsonl")
    monkeypatch.setattr(harness, "device_name", lambda device: DEVICE)
    rows = [row for row in kernels.main(config) if row["name"] != "torch"]
    forward = [row for row in rows if row["mode"] == "forward"]
    assert [row["predicted_us"] for row in forward] == [*range(1, len(forward) + 1)]
    assert {row["verdict"] for row in forward} == {"slower"}
    assert {row["verdict"] for row in rows if row["mode"] == "backward"} == {"not predicted"}


def test_a_setting_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(steps, "built", fail)
    (row,) = kernels.attempted(SETTINGS[0], kernels.Config(device="cpu"), torch.float32, [])
    assert row["failure"] == "RuntimeError: no such kernel" and row["tokens"] == 4096
    assert "no such kernel" in kernels.report([row])


def test_the_profiler_tells_what_ran_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def event(name: str, start: float, us: float, kind: Any = torch.autograd.DeviceType.CUDA) -> Any:
        span = SimpleNamespace(start=start, elapsed_us=lambda: us)
        return SimpleNamespace(name=name, device_type=kind, time_range=span)

    found = [event("b", 2, 3.0), event("launch", 0, 9.0, torch.autograd.DeviceType.CPU), event("a", 1, 2.0)]
    profile = SimpleNamespace(events=lambda: found)
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: nullcontext(profile))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert kernels.profiled(lambda: None) == [("a", 2e-6), ("b", 3e-6)]
