"""Rows as suites store them."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import Row


def row(name: str, tokens: int, milliseconds: float | None, heads: int = 2, **facts: Any) -> Row:
    """As a suite stores it; without a time where None."""
    stored = {
        "suite": "layer", "commit": "0123456", "torch": "2.0", "triton": None, "device": "a device",
        "device_type": "cpu", "threads": 1, "date": "2026-01-02T03:04:05+00:00", "dtype": "float32", "batch": 1,
        "dim": 128, "mode": "forward", "name": name, "heads": heads, "tokens": tokens,
    }  # fmt: skip
    if milliseconds is None:
        return {**stored, "skipped": "out of memory", **facts}
    measured = {"median_ms": milliseconds, "peak_mib": 10 * milliseconds, "percent_of_ceiling": 50.0}
    return {**stored, "skipped": None, **measured, **facts}
