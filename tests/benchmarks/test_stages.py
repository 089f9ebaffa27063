"""The suite of stages: on the torch backend, and with the kernels in Triton's interpreter."""

from __future__ import annotations

import pickle
import time
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import layer, stages, suite
from benchmarks.offline.prediction import steps
from benchmarks.roofline import Shape
from dydila_kernels import DyDiLAttention
from tests import interpreter

SMALL = stages.Config(device="cpu", threads=1, dim=32, heads=(1, 2), repeats=1, sizes=(16,))


def test_all_stages_run_on_the_torch_backend(capsys: pytest.CaptureFixture[str]) -> None:
    rows = stages.main(stages.Config(smoke=True, device="cpu", threads=1, dim=32, heads=(2,)))
    assert suite.exit_code(rows) == 0
    ours = [row for row in rows if row["name"] == "dydila"]
    missing = {row["stage"] for row in ours if row["skipped"]}
    assert missing == {"gradients"}
    assert all(row["skipped"].startswith("missing: the kernels need a GPU") for row in ours if row["skipped"])
    failed = {(row["stage"], row["name"]): row["skipped"] for row in rows if row["skipped"] and row not in ours}
    assert not failed
    assert {row["stage"] for row in rows} == set(stages.RIVALS) == set(stages.KERNELS)
    assert {row["mode"] for row in rows if row["stage"] == "projection"} == set(suite.MODES)
    assert all(row["error_ratio"] <= 2 for row in ours if not row["skipped"])
    assert "stage readout, mode forward, dim 32" in capsys.readouterr().out


@pytest.mark.skipif(not interpreter.INTERPRETED, reason="the kernels need a GPU, or Triton's interpreter")
@pytest.mark.parametrize("wide", [False, True], ids=["fused", "gemm"])
def test_all_kernels_run_in_the_interpreter(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from dydila_kernels.ops import configs, core

    monkeypatch.setattr(stages, "runs_kernels", lambda *_: True)
    monkeypatch.setattr(layer, "DyDiLAttention", partial(DyDiLAttention, backend="triton"))
    if wide:
        monkeypatch.setattr(core, "LARGEST_HEAD", 8)
        monkeypatch.setattr(configs, "LARGEST_HEAD", 8)
    layer.error_ratio.cache_clear()
    steps.launched.cache_clear()
    left_out = set()
    for comparison in stages.comparisons(SMALL):
        for contender in comparison:
            where = (contender.labels["stage"], contender.labels.get("heads"))
            if contender.missing:
                left_out.add(where)
                continue
            call = contender.prepare()
            call()
            if contender.clock is not None:
                before = time.perf_counter()
                assert 0 < contender.clock(call) < time.perf_counter() - before, where
            if contender.error_ratio is not None:
                assert contender.error_ratio() <= 4, where  # of 16 tokens
    layer.error_ratio.cache_clear()
    steps.launched.cache_clear()
    # One wide head of 32 channels is more than 16 tokens.
    assert left_out == ({("state", 1), ("readout", 1)} if wide else set())


def test_what_is_timed_is_the_part_of_the_stage() -> None:
    """Of all parts together it is the most of a call of the layer, and each is less than the call."""
    case = suite.Case("dydila", "forward", Shape(1, 1024, 64, 2, torch.float32), "cpu")
    call = layer.prepare(case)
    call()
    clocks = [stages.clock_of(case._replace(stage=stage)) for stage in stages.FUNCTIONS]
    start = time.perf_counter()
    call()
    whole = time.perf_counter() - start
    parts = [clock(call) for clock in clocks]
    assert all(part > 0 for part in parts) and 0.2 * whole < sum(parts) < 5 * whole


WRITTEN = ["prepare_kernel", "gluon_tokens_kernel", "state_kernel", "sum", "prepare_kernel", "gluon_tokens_kernel",
           "product_kernel", "depthwise_kernel", "gemm"]  # fmt: skip
FUSED = ["tokens_kernel", "state_kernel", "sum", "readout_kernel", "gemm"]
WIDE = ["prepare_kernel", "gluon_tokens_kernel", "gemm", "copy", "prepare_kernel", "gluon_tokens_kernel", "gemm",
        "depthwise_kernel", "gemm"]  # fmt: skip
BACKWARD = ["gemm", "gluon_dots_kernel", "sum", "gluon_gradients_kernel", "gluon_gradients_kernel", "depthwise_kernel"]


@pytest.mark.parametrize(
    ("names", "stage", "places"),
    [
        (WRITTEN, "tokens", [0, 1, 4, 5]), (WRITTEN, "state", [2]), (WRITTEN, "readout", [6]),
        (WRITTEN, "convolution", [7]),
        (FUSED, "tokens", [0]), (FUSED, "state", [1]), (FUSED, "readout", [3]),
        (WIDE, "tokens", [0, 1, 4, 5]), (WIDE, "state", [2, 3]), (WIDE, "readout", [6]), (WIDE, "convolution", [7]),
        (BACKWARD, "gradients", [1, 3, 4]),
        (["state_kernel", "gradients_kernel", "gradients_kernel"], "gradients", [0, 1, 2]),
    ],
)  # fmt: skip
def test_launches_of_a_stage_in_each_form(names: list[str], stage: str, places: list[int]) -> None:
    spans = [(name, 2.0**i) for i, name in enumerate(names)]
    assert stages.seconds_of(stage, spans) == sum(2.0**i for i in places)


@pytest.mark.parametrize("stage", stages.KERNELS)
def test_a_stage_without_launches_is_no_time(stage: str) -> None:
    with pytest.raises(RuntimeError, match=f"launched none of {stages.KERNELS[stage][0]}"):
        stages.seconds_of(stage, [("gemm", 1.0)])


def test_a_stage_that_a_call_does_not_have_is_no_time() -> None:
    clock = stages.clock_of(suite.Case("dydila", "forward", Shape(1, 16, 32, 1, torch.float32), "cpu", "convolution"))
    with pytest.raises(RuntimeError, match=r"went through none of ValueBlocks\.convolve, add_depthwise"):
        clock(lambda: None)


@pytest.mark.parametrize("project", [stages.grouped, stages.dense])
def test_projections_agree(project: stages.Callable[..., torch.Tensor]) -> None:
    if project is stages.grouped and not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this version of torch has none")
    x, weight, router = torch.randn(2, 40, 16), torch.randn(3, 16, 16), torch.randn(16, 3)
    chosen = weight[(x @ router).argmax(-1)]
    torch.testing.assert_close(project(x, weight, router), (x[..., None, :] @ chosen).squeeze(-2))


@pytest.mark.parametrize("stage", ["state", "readout", "projection", "convolution"])
def test_declared_flops_are_those_counted(stage: str) -> None:
    name = {"projection": "dense", "convolution": "conv2d"}.get(stage, "bmm")
    case = suite.Case(name, "forward", Shape(2, 64, 32, 2, torch.float32), "cpu", stage)
    call = stages.RIVALS[stage][name](case)
    with FlopCounterMode(display=False) as counter:
        call()
    declared = stages.cost(case).flops
    product = 2 * 2 * case.shape.rows * case.shape.dim**2
    # All projectors on all tokens does more than what has to be done.
    assert counter.get_total_flops() == declared + (stages.PROJECTORS - 1) * product * (stage == "projection")


def test_prepared_calls_pickle() -> None:
    for comparison in stages.comparisons(SMALL):
        for contender in comparison:
            pickle.dumps(contender.prepare)
