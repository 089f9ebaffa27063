"""The benchmarks of what launches and calls cost the host: what they take apart and time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.harness import REPOSITORY, read_rows
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


def test_a_call_of_the_layer_has_no_more_launches_than_were_kept(tmp_path: Path) -> None:
    """The last rows that are kept are those of the present kernels."""
    out = tmp_path / "rows.jsonl"
    done = compiling("-m", "benchmarks.offline.host", "--repeats", "3", "--out", str(out))
    assert done.returncode == 0, done.stderr
    kept = {row["call"]: row for row in read_rows(REPOSITORY / "benchmarks" / "results" / "host.jsonl")}
    rows = {row["call"]: row for row in read_rows(out)}
    assert rows.keys() == kept.keys()
    for call, row in rows.items():
        assert 0 < row["launches"] <= kept[call]["launches"]
        assert 0 < row["linear_us"] < row["host_us"]
