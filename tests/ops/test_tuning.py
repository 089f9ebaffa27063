"""Launch configurations: the table, how sizes run, and tuning for those who ask."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dydila_kernels import tuning
from dydila_kernels.ops import configs, core
from tests.ops.helpers import DEVICE

SHAPE = (1, 16, 32, 2)


@pytest.fixture(autouse=True)
def untuned() -> Iterator[None]:
    yield
    configs.TUNED.clear()


def test_every_configuration_has_a_reason_and_tiles_that_triton_takes() -> None:
    for entries in configs.TABLE.values():
        assert [e.width for e in entries] == sorted(e.width for e in entries) and entries[-1].width == configs.ANY
        for config in (e.config for e in entries):
            assert config.reason
            for n in (config.block_n, config.block_d, config.warps):
                assert n & (n - 1) == 0


def test_tuning_keeps_what_is_faster_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that likes state kernels of 16 rows, and is a little faster by chance for all others."""
    key = ("state", "single", 16)

    def duration(call: Callable[[], object], device: torch.device, repeats: int) -> float:
        call()
        return 0.5 if configs.lookup(key).block_n == 16 else 0.995 if configs.TUNED else 1.0

    monkeypatch.setattr(tuning, "duration", duration)
    found = tuning.tune([SHAPE], dtype=torch.float32, device=DEVICE, training=False, repeats=1)
    assert list(found) == [key] and found[key].block_n == 16 and found == configs.TUNED
    assert configs.asked is None


def test_alternatives_differ_in_one_number_or_in_rows_and_warps_alike() -> None:
    config = configs.Config(64, 32, 4, 2, reason="here")
    others = [(c.block_n, c.block_d, c.warps, c.stages) for c in tuning.alternatives(config)]
    alike = [(32, 32, 2, 2), (128, 32, 8, 2)]
    single = [(32, 32, 4, 2), (128, 32, 4, 2), (64, 16, 4, 2), (64, 64, 4, 2), (64, 32, 2, 2), (64, 32, 8, 2)]
    assert sorted(others) == sorted([*single, *alike, (64, 32, 4, 1), (64, 32, 4, 3)])
    assert all(c.block_n * c.block_d >= 64 * c.warps for c in tuning.alternatives(configs.Config(16, 16, 4)))
    rows = [(c.block_n, c.block_d, c.warps) for c in tuning.alternatives(configs.Config(64, 32, 4), "gluon_gradients")]
    assert rows == [(32, 32, 2), (128, 32, 8)]


def test_tuning_passes_over_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    def duration(call: Callable[[], object], device: torch.device, repeats: int) -> float:
        if configs.TUNED:
            raise OutOfResources(300000, 232448, "shared memory")
        return 1.0

    monkeypatch.setattr(tuning, "duration", duration)
    with pytest.warns(UserWarning, match="OutOfResources: out of resource: shared memory"):
        assert tuning.tune([SHAPE], dtype=torch.float32, device=DEVICE, training=False) == {} == configs.TUNED


def test_tuning_reports_what_does_not_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a pass of Triton fails, all that it raises is a RuntimeError."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile

    broken = tmp_path / "broken.ttir"
    broken.write_text("module { this is no kernel }")

    def duration(call: Callable[[], object], device: torch.device, repeats: int) -> float:
        if configs.TUNED:
            compile(str(broken), target=GPUTarget("cuda", 90, 32))
        return 1.0

    monkeypatch.setattr(tuning, "duration", duration)
    with pytest.warns(UserWarning, match=r"state: Config\(block_n=.* was passed over: RuntimeError"):
        assert tuning.tune([SHAPE], dtype=torch.float32, device=DEVICE, training=False) == {} == configs.TUNED


def test_tuning_stops_at_any_other_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def duration(call: Callable[[], object], device: torch.device, repeats: int) -> float:
        if configs.TUNED:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return 1.0

    monkeypatch.setattr(tuning, "duration", duration)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tuning.tune([SHAPE], dtype=torch.float32, device=DEVICE, training=False)


@pytest.mark.slow
def test_the_clock_measures() -> None:
    call: Any = torch.zeros(8).exp
    assert 0 < tuning.duration(call, torch.device("cpu"), 3) < 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"shapes": [(1, 16, 32)]}, r"\(B, N, d, H\); got \(1, 16, 32\)"),
        ({"shapes": [(1, 0, 32, 2)]}, "N must be"),
        ({"shapes": [(1, 16, 32, 5)]}, "divisible"),
        ({"shapes": [SHAPE], "repeats": 0}, "repeats"),
    ],
)
def test_bad_shapes(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tuning.tune(**arguments, dtype=torch.float32, device=DEVICE)


def test_tuning_says_where_the_kernels_cannot_run() -> None:
    with pytest.raises(RuntimeError, match="float64"):
        tuning.tune([SHAPE], dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match="got meta, which has nothing to time"):
        tuning.tune([SHAPE], device="meta")


@pytest.mark.parametrize(
    ("dim", "heads", "words"),
    [
        (384, 1, ["heads of 384 > 128", "GEMMs"]),
        (384, 6, ["heads of 64: fused"]),
        (1152, 16, ["heads of 72: fused", "24 of 96 are padding", "results of 128"]),
        (130, 10, ["260 bytes", "narrow"]),
    ],
)
def test_how_a_size_runs(dim: int, heads: int, words: list[str]) -> None:
    said = core.describe(dim, heads, torch.bfloat16)
    assert all(word in said for word in words), said
    assert ("narrow" in said) == (dim % 8 != 0)


def test_the_report_says_how_a_size_runs() -> None:
    command = [sys.executable, "-m", "dydila_kernels", "--dim", "1152", "--heads"]
    done = subprocess.run([*command, "16"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and core.describe(1152, 16, torch.bfloat16) in done.stdout, done
    done = subprocess.run([*command, "7"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "--heads must divide --dim" in done.stderr
