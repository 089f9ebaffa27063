"""A short run of the fuzzer, and that it finds what is wrong; ``python -m tests.fuzz`` is the long run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dydila_kernels import DyDiLAttention
from dydila_kernels.testing import relative_error
from tests import fuzz

COUNT, SEED = 40, 1


@pytest.mark.slow
def test_random_cases(capsys: pytest.CaptureFixture[str]) -> None:
    failed = fuzz.fuzz(COUNT, SEED)
    report = capsys.readouterr().out
    assert not failed, report
    assert f"{COUNT} cases of seed {SEED} on {fuzz.DEVICE}: 0 failed" in report


def spoil_forward(monkeypatch: pytest.MonkeyPatch, spoil: Any) -> None:
    forward = DyDiLAttention.forward
    monkeypatch.setattr(DyDiLAttention, "forward", lambda *args, **kwargs: spoil(forward(*args, **kwargs)))


def one_wrong_token(out: Tensor) -> Tensor:
    factors = torch.ones((*out.shape[:2], 1), dtype=out.dtype)
    factors[:1, :1] = 1.1
    return out * factors


@pytest.mark.parametrize("spoil", [one_wrong_token, torch.zeros_like, lambda out: out.mT, lambda out: 1 / 0])
def test_a_wrong_layer_is_found_and_the_case_named(monkeypatch: pytest.MonkeyPatch, spoil: Any) -> None:
    lines: list[str] = []
    spoil_forward(monkeypatch, spoil)
    failed = fuzz.fuzz(10, SEED, lines.append)
    assert failed and lines[0].startswith(f"python -m tests.fuzz --seed {SEED} --case {failed[0]}: ")
    assert lines[-1].startswith(f"10 cases of seed {SEED} on {fuzz.DEVICE}: {len(failed)} failed")


def test_a_case_is_the_same_alone() -> None:
    one, other = (fuzz.draw_layer(fuzz.Draw("1/7"), "torch") for _ in range(2))
    assert str(one.about) == str(other.about)
    assert all(torch.equal(t, other.inputs[name]) for name, t in one.inputs.items())


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--seed", "1", "--case", "2"]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("case 2 of seed 1 (") and "is right" in run.stdout


# --- what the fuzzer found


@pytest.mark.parametrize("HW, cu_seqlens", [((3, 0), None), ([(2, 2), (3, 0), (0, 2)], [0, 7, 10, 13])], ids=str)
def test_images_of_prefix_tokens_alone_have_no_rows_to_convolve(HW: Any, cu_seqlens: Any) -> None:
    attn = DyDiLAttention(8, num_prefix_tokens=3, dtype=torch.float64)
    x = torch.randn(1, 3 if cu_seqlens is None else 13, 8, dtype=torch.float64)
    expected = attn(x, HW=HW, cu_seqlens=cu_seqlens)
    for elements in (8, 2**20):
        with fuzz.blocks_of(elements), torch.no_grad():
            assert relative_error(attn(x, HW=HW, cu_seqlens=cu_seqlens), expected) < 1e-14
