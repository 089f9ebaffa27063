"""The benchmark of Triton's binder: what it takes apart and times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ops.test_offline import compiling


@pytest.mark.slow
def test_times_every_kernel_in_both_forms(tmp_path: Path) -> None:
    """Grouped arguments are no more than 15, and no dearer to bind than the same one by one."""
    out = tmp_path / "rows.jsonl"
    done = compiling("-m", "benchmarks.offline.binder", "--repeats", "200", "--out", str(out))
    assert done.returncode == 0, done.stderr
    *rows, total = (json.loads(line) for line in out.read_text().splitlines())
    assert {"gluon_tokens_kernel", "gluon_gradients_kernel", "straight_through_kernel"} <= {
        row["kernel"] for row in rows
    }
    assert all(row["parameters"] <= min(15, row["arguments"]) for row in rows)
    assert total["ratio"] < 1
