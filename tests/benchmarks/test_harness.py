"""Timing, memory and rows."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import harness


def test_not_a_number_is_red() -> None:
    harness.require_correct(2.0)
    for ratio in (math.nan, math.inf, 2.5):
        with pytest.raises(harness.CheckFailed):
            harness.require_correct(ratio)


def test_calls_take_turns_and_the_first_is_dropped() -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    clocks = {name: harness.clock(call) for name, call in calls.items()}
    seconds = harness.interleave(clocks, repeats=3, budget_seconds=60)
    assert order == ["a", "b"] * 4
    assert {name: len(samples) for name, samples in seconds.items()} == {"a": 3, "b": 3}


def test_a_call_over_budget_is_made_once_and_counts() -> None:
    slow = harness.clock(lambda: time.sleep(0.02))
    seconds = harness.interleave({"slow": slow}, repeats=3, budget_seconds=0.01)
    assert len(seconds["slow"]) == 1 and seconds["slow"][0] >= 0.02


def test_a_summary_is_of_milliseconds() -> None:
    found = harness.summarize([0.001, 0.002, 0.003])
    assert found == pytest.approx({"median_ms": 2.0, "q10_ms": 1.2, "q90_ms": 2.8, "repeats": 3})


def test_rows_come_back_with_what_was_there(tmp_path: Path) -> None:
    facts = harness.environment("cpu")
    assert datetime.fromisoformat(facts["date"]).tzinfo is not None
    assert all(facts[fact] for fact in ("commit", "torch", "python", "dydila_kernels", "device", "threads"))
    rows = [{**facts, "median_ms": 0.125, "skipped": None}]
    harness.write_rows(tmp_path / "new" / "rows.jsonl", rows)
    assert harness.read_rows(tmp_path / "new" / "rows.jsonl") == rows


@pytest.mark.skipif(platform.system() != "Linux", reason="resident memory is read from Linux's /proc")
def test_peak_memory_is_what_the_call_allocates_whatever_the_parent_holds() -> None:
    held = np.ones(100 * harness.MIB, dtype=np.uint8)
    growth = harness.in_fresh_process(harness.peak_growth_mib, _allocate_and_free_64_mib)
    assert held[-1] == 1
    assert 63 < growth < 70


def _allocate_and_free_64_mib() -> None:
    np.ones(64 * harness.MIB, dtype=np.uint8)


def test_a_graph_is_captured_on_the_stream_that_its_call_was_prepared_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for CUDA, which say where things happen."""
    on: list[object] = ["main"]
    happened: list[tuple[str, object]] = []

    class Stream:
        def wait_stream(self, _other: object) -> None:
            happened.append(("wait", on[-1]))

    @contextmanager
    def use(stream: object) -> Iterator[None]:
        on.append(stream)
        yield
        on.pop()

    graph = SimpleNamespace(replay=lambda: happened.append(("replay", on[-1])))
    stand_ins = {"Stream": Stream, "current_stream": Stream, "stream": use, "CUDAGraph": lambda: graph}
    for name, stand_in in {**stand_ins, "graph": lambda _, stream: use(stream)}.items():
        monkeypatch.setattr(harness.torch.cuda, name, stand_in)

    def prepare() -> harness.Call:
        happened.append(("prepare", on[-1]))
        return lambda: happened.append(("call", on[-1]))

    harness.captured(prepare)()
    what, where = zip(*happened, strict=True)
    assert what == ("wait", "prepare", "call", "call", "wait", "call", "replay")
    assert len({*where[1:4], where[5]}) == 1 and {where[0], where[4], where[6]} == {"main"}
