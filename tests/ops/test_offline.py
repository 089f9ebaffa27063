"""The offline compilation derives what Triton would compile, and finds the faults that it is there to find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from benchmarks.harness import REPOSITORY, Row
from benchmarks.offline.compiling import TARGETS, record, resident_warps
from benchmarks.offline.table import FIGURES, LABELS, problems, read_table, write_table
from dydila_kernels.ops.tiles import INTERPRETED
from tests.ops.helpers import STAGES, TALL


def compiling(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process that compiles kernels, whatever this one does."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )


def result_of(function: str, *arguments: Any) -> Any:
    """Of a function in ``offline_kernels.py``."""
    call = f"offline_kernels.{function}(*{arguments!r})"
    script = f"import json; from tests.ops import offline_kernels; print(json.dumps({call}))"
    done = compiling("-c", script)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_specialisation_is_that_of_triton() -> None:
    found = result_of("derive")
    assert found["signature"] == {
        "X": "*fp16",
        "BIAS": "constexpr",
        "Y": "*fp16",
        "n": "i64",
        "stride": "i32",
        "scale": "fp32",
        "shift": "u1",
        "START": "constexpr",
        "BLOCK": "constexpr",
    }
    assert found["options"] == "START=0 BLOCK=256 -BIAS"
    assert found["aligned"] == ["X", "Y", "n"]
    assert found["stride of one"] == ["constexpr", 1]
    assert found["small"] == "i32"
    assert found["same"] and not found["different"]


def test_gluon_compiles() -> None:
    """With every version of Triton that there is: Gluon's names and rules change between them."""
    found = result_of("in_gluon")
    assert {name.split()[-1] for name in found} == {
        "prepare_kernel", "gluon_tokens_kernel", "gluon_dots_kernel", "gluon_gradients_kernel"
    }  # fmt: skip
    assert not any(any(errors) for errors in found.values()), found


@pytest.mark.slow
def test_faults_are_found() -> None:
    found = result_of("judge")
    assert [name for name, faults in found.items() if not faults] == [name for name in found if "good" in name]
    assert "stack" in found["spills"][0] and "stack" in found["spills on gfx942"][0]
    assert "shared memory" in found["shared memory"][0]
    assert "tensor-core" in found["no tensor core"][0]


@pytest.mark.slow
def test_the_largest_tiles_of_the_tests_compile() -> None:
    """With 128 or 256 rows a pass of Triton fails on the gradients of keys."""
    found = result_of("tiles_of", *TALL, list(STAGES))
    assert len(found) > 12 and not any(found.values()), {name: error for name, error in found.items() if error}


@pytest.mark.slow
def test_kernels_for_float32_divide_and_take_roots_exactly() -> None:
    found = result_of("approximate")
    assert len(found) > 9 and not any(found.values()), {name: code for name, code in found.items() if code}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("d", "head", "normalization"),
    [(36, 12, "length"), (136, 136, "length"), (64, 32, "denominator"), (136, 136, "denominator")],
)
def test_lanes_that_hold_the_same_sum_hold_the_same_bits(d: int, head: int, normalization: str) -> None:
    """Where rows are no multiple of 16, neighbouring channels are in neighbouring lanes."""
    found = result_of("fused_with_another_lane", d, head, normalization)
    assert len(found) > 4 and not any(found.values()), found


@pytest.mark.slow
def test_no_thread_of_the_convolution_waits_for_another() -> None:
    assert result_of("exchanges_of_the_convolution") == 0


def a_row(**figures: Any) -> Row:
    labels = {**dict.fromkeys(LABELS, "x"), "target": "sm_90", "triton": triton.__version__}
    return {**labels, **dict.fromkeys(FIGURES, 100), "stack": 0, **figures}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"registers": 111}, "registers 100 -> 111"),
        ({"stack": 8}, "stack 0 -> 8"),
        ({"shared": 101}, "shared 100 -> 101"),
        ({"instructions": 111}, "instructions 100 -> 111"),
        ({"mufu": 101}, "mufu 100 -> 101"),
        ({"resident_warps": 99}, "resident warps 100 -> 99"),
        ({"dtype": "y"}, "not in the table"),
        ({"error": "CompilationError: why"}, "CompilationError: why"),
    ],
)
def test_losses_against_the_table(change: Row, message: str) -> None:
    assert problems([a_row()], [a_row()]) == []
    (problem,) = problems([a_row(**change)], [a_row()])
    assert f"sm_90: {message}" in problem


def test_other_versions_of_triton_are_not_compared() -> None:
    assert problems([a_row(registers=200)], [a_row(triton="0.1")]) == []
    assert problems([a_row(stack=72)], [a_row(triton="0.1")]) != []


def test_table_survives_its_file(tmp_path: Path) -> None:
    rows = [
        a_row(options="A=1 B=None"),
        a_row(stage="y", predicted_us=1.5, predicted_barriers=2),
        a_row(stage="z", error="no figures"),
    ]
    write_table(tmp_path / "table.csv", rows)
    assert read_table(tmp_path / "table.csv") == rows[:2]


def test_resident_warps() -> None:
    assert resident_warps(TARGETS["sm_90"], 32, 0, 4) == 64
    assert resident_warps(TARGETS["sm_90"], 168, 0, 4) == 12
    assert resident_warps(TARGETS["sm_86"], 32, 49 * 1024, 4) == 8
    assert resident_warps(TARGETS["sm_80"], 255, 0, 8) == 8
    assert resident_warps(TARGETS["gfx942"], 128, 0, 4) == 16
    assert resident_warps(TARGETS["gfx942"], 64, 33 * 1024, 4) == 4


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter cannot compile")
def test_interpreted_kernels_are_refused() -> None:
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        record(lambda: None, {}, "sm_90", TARGETS["sm_90"])


@pytest.mark.slow
def test_check_against_a_table(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"

    def offline(*arguments: str) -> subprocess.CompletedProcess[str]:
        return compiling("-m", "benchmarks.offline", "--subset", "--table", str(table), *arguments)

    for kernel in ("depthwise/depthwise_kernel", "projection/count"):  # the second adds to what the first wrote
        written = offline("--only", kernel)
        assert written.returncode == 0, written.stdout + written.stderr
    rows = read_table(table)
    assert {row["kernel"] for row in rows} == {"depthwise_kernel", "count_kernel"}
    checked = offline("--only", "depthwise/depthwise_kernel", "--check")
    assert checked.returncode == 0, checked.stdout + checked.stderr

    row = next(row for row in rows if row["kernel"] == "depthwise_kernel")
    before, row["instructions"] = row["instructions"], row["instructions"] // 2
    write_table(table, rows)
    checked = offline("--only", "depthwise/depthwise_kernel", "--check")
    assert checked.returncode == 1
    assert f"{row['target']}: instructions {row['instructions']} -> {before} ({row['options']}" in checked.stdout
    assert {row["target"] for row in rows if "predicted_us" in row} == {"sm_90"}
