"""The suite of single stages: on the torch backend, and with the kernels in Triton's interpreter."""

from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import stages, suite
from benchmarks.roofline import Shape
from tests import interpreter

SMALL = {"device": "cpu", "threads": 1, "dim": 32, "heads": (1, 2), "repeats": 1, "sizes": (16,)}


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "runs_kernels", lambda *_: False)


def test_all_stages_run_on_the_torch_backend(without_kernels: None, capsys: pytest.CaptureFixture[str]) -> None:
    rows = stages.main(stages.Config(smoke=True, device="cpu", threads=1, dim=32, heads=(2,)))
    assert suite.exit_code(rows) == 0
    ours = [row for row in rows if row["name"] == "dydila"]
    missing = {row["stage"] for row in ours if row["skipped"]}
    assert missing == {"gradients of queries", "gradients of keys"}
    assert all(row["skipped"].startswith("missing: the kernels need a GPU") for row in ours if row["skipped"])
    failed = {(row["stage"], row["name"]): row["skipped"] for row in rows if row["skipped"] and row not in ours}
    assert not failed
    assert {row["stage"] for row in rows} == set(stages.RIVALS)
    assert {row["mode"] for row in rows if row["stage"] == "projection"} == set(suite.MODES)
    assert all(row["error_ratio"] <= 2 for row in ours if not row["skipped"])
    assert "stage readout, mode forward, dim 32" in capsys.readouterr().out


@pytest.mark.skipif(not interpreter.INTERPRETED, reason="the kernels need a GPU, or Triton's interpreter")
@pytest.mark.parametrize("wide", [False, True], ids=["fused", "gemm"])
def test_all_kernels_run_in_the_interpreter(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if wide:
        from dydila_kernels.ops import core

        monkeypatch.setattr(core, "LARGEST_HEAD", 8)
    stages.kernel_error_ratios.cache_clear()
    config = stages.Config(**SMALL)  # type: ignore[arg-type]
    for comparison in stages.comparisons(config):
        for contender in comparison.contenders.values():
            contender.prepare()()
            if contender.error_ratio is not None:
                assert contender.error_ratio() <= 4, (comparison.series, contender.labels)  # of 16 tokens


@pytest.mark.parametrize("name", ["grouped_mm", "dense"])
def test_projections_agree(name: str) -> None:
    if name == "grouped_mm" and not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this version of torch has none")
    x, weight, router = torch.randn(2, 40, 16), torch.randn(3, 16, 16), torch.randn(16, 3)
    torch.testing.assert_close(
        stages.PROJECTIONS[name](x, weight, router), stages.PROJECTIONS["dydila"](x, weight, router)
    )


@pytest.mark.parametrize("stage", ["state", "readout", "projection"])
def test_declared_flops_are_those_counted(stage: str, without_kernels: None) -> None:
    name = "dense" if stage == "projection" else "bmm"
    shape = Shape(2, 64, 32, 1 if stage == "projection" else 2, torch.float32)
    prepare = stages.project if stage == "projection" else partial(stages.prepare, stage)
    call = prepare(name, "forward", shape, "cpu")
    with FlopCounterMode(display=False) as counter:
        call()
    declared = stages.cost(stage, name, "forward", shape, False).flops
    product = 2 * shape.rows * shape.dim**2
    # All projectors on all tokens does more than what has to be done.
    assert counter.get_total_flops() == declared + (stages.PROJECTORS - 1) * product * (stage == "projection")


def test_prepared_calls_pickle() -> None:
    for comparison in stages.comparisons(stages.Config(**SMALL)):  # type: ignore[arg-type]
        for contender in comparison.contenders.values():
            pickle.dumps(contender.prepare)
