"""The benchmark of what a call of the layer costs the host."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness import REPOSITORY, read_rows
from tests.ops.test_offline import compiling


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
