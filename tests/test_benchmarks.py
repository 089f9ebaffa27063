"""The benchmarks measure what they say, and nothing when the results are wrong."""

from __future__ import annotations

import math
import platform
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from benchmarks import harness, layer, plot


def test_smoke_run_stores_rows_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows" / "layer.jsonl"
    returned = layer.main(layer.Config(smoke=True, dim=96, threads=1, out=out))

    rows = harness.read_rows(out)
    assert rows == returned
    cells = {(row["layer"], row["heads"], row["mode"], row["tokens"]) for row in rows}
    assert len(rows) == len(cells) == 3 * 2 * 2
    for row in rows:
        assert 0 < row["q10_ms"] <= row["median_ms"] <= row["q90_ms"]
        assert row["repeats"] == 2 and row["skipped"] is None
        assert row["error_ratio"] <= 2
        assert datetime.fromisoformat(row["date"]).tzinfo is not None
        assert all(row[fact] for fact in ("commit", "torch", "python", "dydila_kernels", "device", "threads"))
        assert row["peak_mib"] is None or 0 <= row["peak_mib"] < 1000

    table = capsys.readouterr().out
    assert "forward+backward, d = 96" in table and "speed-up" in table and "256" in table
    picture = plot.main(plot.Config(rows=out))
    assert picture.parent == out.parent and picture.stat().st_size > 1000


def test_nothing_is_timed_when_the_check_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(*_: object, **__: object) -> None:
        raise AssertionError("timed although the check is red")

    monkeypatch.setattr(layer, "layer_error_ratio", lambda *_, **__: 2.5)
    monkeypatch.setattr(harness, "interleave", timed)
    with pytest.raises(harness.CheckFailed, match=r"2\.5 times"):
        layer.main(layer.Config(smoke=True, dim=96, threads=1, out=tmp_path / "layer.jsonl"))
    assert not list(tmp_path.iterdir())


def test_not_a_number_is_red() -> None:
    with pytest.raises(harness.CheckFailed):
        harness.require_correct(math.nan)


def test_calls_take_turns_and_the_first_is_dropped() -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = harness.interleave(calls, repeats=3, budget_seconds=60)
    assert order == ["a", "b"] * 4
    assert {name: len(samples) for name, samples in seconds.items()} == {"a": 3, "b": 3}


def test_a_call_over_budget_is_made_once_and_counts() -> None:
    seconds = harness.interleave({"slow": lambda: time.sleep(0.02)}, repeats=3, budget_seconds=0.01)
    assert len(seconds["slow"]) == 1 and seconds["slow"][0] >= 0.02


def test_softmax_expected_over_budget_is_skipped_with_no_number() -> None:
    rows = layer.main(layer.Config(smoke=True, dim=96, threads=1, skip_over_seconds=0.0))
    skipped = [row for row in rows if row["skipped"]]
    assert {(row["layer"], row["tokens"]) for row in skipped} == {("softmax", 256)}
    assert all("over budget" in row["skipped"] and "median_ms" not in row for row in skipped)
    assert "skipped" in layer.table([row for row in rows if row["mode"] == "forward"])


@pytest.mark.skipif(platform.system() != "Linux", reason="resident memory is read from Linux's /proc")
def test_peak_memory_is_what_the_call_allocates_whatever_the_parent_holds() -> None:
    held = np.ones(100 * harness.MIB, dtype=np.uint8)
    growth = harness.in_fresh_process(harness.peak_growth_mib, _allocate_and_free_64_mib)
    assert held[-1] == 1
    assert 63 < growth < 70


def _allocate_and_free_64_mib() -> None:
    np.ones(64 * harness.MIB, dtype=np.uint8)
