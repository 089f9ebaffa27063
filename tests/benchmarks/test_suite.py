"""How suites run, and what they declare, against independent counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import core, harness, rivals, roofline, suite
from benchmarks.roofline import Cost, Shape
from benchmarks.suite import Contender

OPTIONS = suite.Options(device="cpu", threads=1, smoke=True)
CEILINGS = {"copy_gb_s": 10.0, "float32_tflop_s": 0.1, "bfloat16_tflop_s": 0.2}
COST = Cost(1e6, 1e6)
LABELS = {"name": "a", "mode": "forward", "dim": 8, "tokens": 64}


def run(contenders: dict[str, Contender], **options: object) -> list[harness.Row]:
    for name, contender in contenders.items():
        contender.labels = {**LABELS, "name": name}
    return suite.measure(replace(OPTIONS, **options), [*contenders.values()], CEILINGS)  # type: ignore[arg-type]


def fails(error: Exception) -> Callable[[], object]:
    def call() -> object:
        raise error

    return call


def never() -> object:
    raise AssertionError("called although it must not be")


def contender_of(prepare: Callable[[], Callable[[], object]], **facts: Any) -> Contender:
    return Contender(prepare, LABELS, **facts)


def fine() -> Contender:
    return contender_of(lambda: lambda: None, cost=COST)


@pytest.mark.parametrize("ratio", [2.5, math.nan])
def test_what_is_wrong_gets_no_time(ratio: float) -> None:
    wrong, right = run({"wrong": contender_of(never, error_ratio=lambda: ratio), "right": fine()})
    assert wrong["skipped"] == suite.WRONG and "median_ms" not in wrong
    assert right["skipped"] is None and right["median_ms"] >= 0
    assert suite.exit_code([right]) == 0 and suite.exit_code([right, wrong]) == 1


@pytest.mark.parametrize(
    ("contender", "reason"),
    [
        (contender_of(lambda: fails(torch.OutOfMemoryError("no room"))), "out of memory"),
        (contender_of(fails(torch.OutOfMemoryError("no room"))), "out of memory"),
        (contender_of(lambda: fails(ValueError("bad\nsecond line"))), "failed: ValueError: bad"),
        (contender_of(fails(RuntimeError("at once"))), "failed: RuntimeError: at once"),
        (contender_of(never, error_ratio=fails(KeyError("x"))), "failed: KeyError: 'x'"),  # type: ignore[arg-type]
        (contender_of(never, missing="missing: not installed"), "missing: not installed"),
        (contender_of(lambda: lambda: None, warm_up=fails(ValueError("cold"))), "failed: ValueError: cold"),
    ],
)
def test_what_goes_wrong_is_in_the_row_and_the_others_go_on(contender: Contender, reason: str) -> None:
    before, bad, after = run({"before": fine(), "bad": contender, "after": fine()})
    assert bad["skipped"] == reason
    assert all(row["skipped"] is None and row["repeats"] == 2 for row in (before, after))
    text = suite.report([before, bad, after])
    assert reason.split(":")[0] in text and "before" in text


def test_caches_are_flushed_before_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    monkeypatch.setattr(Tensor, "add_", lambda tensor, _: happened.append(f"flush {tensor.numel() // 2**20}"))
    run({name: contender_of(lambda name=name: lambda: happened.append(name)) for name in "ab"})
    assert happened == ["flush 1", "a", "flush 1", "b"] * 3  # a call to warm up and two that count
    run({"a": contender_of(lambda: lambda: happened.append("a"))}, smoke=False, repeats=1)
    assert happened[12:] == ["flush 256", "a"] * 2


def test_rows_are_stored_with_facts(tmp_path: Path) -> None:
    rows = suite.run("trial", lambda _: [[fine()]], replace(OPTIONS, out=tmp_path))
    assert harness.read_rows(tmp_path / "trial.jsonl") == rows
    assert all(rows[0][fact] for fact in ("suite", "commit", "torch", "device", "date", "dtype", "ceilings"))


def test_a_backward_pass_can_be_called_again_and_again() -> None:
    x = torch.randn(3, requires_grad=True)
    call = suite.call_of("backward", lambda: x**3, [x], torch.ones(3))
    for _ in range(2):
        torch.testing.assert_close(call()[0], 3 * x.detach() ** 2)  # type: ignore[index]


# What is declared -----------------------------------------------------------------------------------------------------

SHAPE = Shape(2, 64, 32, 2, torch.float32)


def counted(mode: str, function: Callable[..., Tensor], leaves: list[Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        out = function(*leaves)
        if mode == "backward":
            forward = counter.get_total_flops()
            torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
            return counter.get_total_flops() - forward
    return counter.get_total_flops()


def leaves(count: int) -> list[Tensor]:
    return [torch.randn(2, 64, 32, requires_grad=True) for _ in range(count)]


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("heads", [1, 2])
def test_flops_of_the_core_are_those_of_the_equations(mode: str, heads: int) -> None:
    inputs = core.random_inputs(replace(SHAPE, heads=heads), "cpu")
    tokens = [inputs.pop(name).requires_grad_() for name in core.TOKENS]
    found = counted(mode, lambda *t: core.reference.dydila_attention(*t, num_heads=heads, **inputs), tokens)
    assert found == roofline.core(replace(SHAPE, heads=heads), mode).flops


def test_flops_of_softmax_are_those_of_its_formula() -> None:
    forward, backward = (
        counted(mode, lambda *t: rivals.plain_softmax(*t, heads=2), leaves(3)) for mode in ("forward", "backward")
    )
    assert forward == roofline.softmax_core(SHAPE, "forward").flops
    assert backward * 5 == roofline.softmax_core(SHAPE, "backward").flops * 4  # plain PyTorch keeps the scores


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_flops_of_linear_attention_are_those_of_its_products(mode: str) -> None:
    found = counted(mode, lambda q, k, v: rivals.split(q, 2) @ (rivals.split(k, 2).mT @ rivals.split(v, 2)), leaves(3))
    # The formula in full has one more column in V, for the denominator.
    with_ones = counted("forward", lambda *t: rivals.sana(*t, heads=2), leaves(3))
    assert found == roofline.linear_core(SHAPE, mode).flops
    assert with_ones == roofline.linear_core(SHAPE, "forward").flops * 17 / 16


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_flops_of_a_linear_layer(mode: str) -> None:
    weight = torch.randn(32, 48, requires_grad=True)
    found = counted(mode, lambda x, w: x @ w, [torch.randn(128, 32, requires_grad=True), weight])
    assert found == roofline.linear(128, 32, 48, mode, torch.float32).flops


def test_flops_of_the_convolution() -> None:
    image, weight = torch.randn(2, 32, 8, 8), torch.randn(32, 1, 3, 3)
    found = counted("forward", lambda x, w: torch.nn.functional.conv2d(x, w, padding=1, groups=32), [image, weight])
    assert found == roofline.convolution(SHAPE, "forward").flops


@pytest.mark.parametrize(
    ("declared", "tensors"),
    [(roofline.core, (6, 11)), (roofline.softmax_core, (4, 8)), (roofline.linear_core, (4, 7))],
)
def test_bytes_are_those_of_the_tensors_that_go_in_and_out(
    declared: Callable[..., Cost], tensors: tuple[int, int]
) -> None:
    one = torch.empty(2, 64, 32).nbytes
    forward, backward, both = (declared(SHAPE, mode).bytes for mode in ("forward", "backward", "forward+backward"))
    assert (forward, backward) == (tensors[0] * one, tensors[1] * one) and both == forward + backward


def test_percent_is_of_the_nearer_ceiling_and_100_at_it() -> None:
    for cost, ceiling, seconds in ((Cost(1e9, 1), "bytes", 0.1), (Cost(1, 1e12), "FLOPs", 10.0)):
        row = roofline.against(cost, seconds, CEILINGS, torch.float32)
        assert row["ceiling"] == ceiling and row["percent_of_ceiling"] == pytest.approx(100)
        assert roofline.against(cost, 2 * seconds, CEILINGS, torch.float32)["percent_of_ceiling"] == pytest.approx(50)
    at_16_bits = roofline.against(Cost(1, 1e12), 10.0, CEILINGS, torch.bfloat16)
    assert at_16_bits["percent_of_ceiling"] == pytest.approx(50)
