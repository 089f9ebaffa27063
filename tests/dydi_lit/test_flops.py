"""The command that counts the FLOPs of the paper's models."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("examples.dydi_lit")
from dydila_kernels import functional
from examples.dydi_lit import flops
from examples.dydi_lit.configs import config_of
from examples.dydi_lit.model import DiffusionTransformer

needs_triton = pytest.mark.skipif(functional.TRITON is None, reason="Triton is not installed")
RIVALS = ("DiG", "PixArt-Sigma", "EDiT")
"""Those whose number of blocks and open choices are taken from the paper's figures."""
ROOT = Path(flops.__file__).parents[2]


@pytest.fixture(scope="module")
def figures() -> list[flops.Row]:
    return list(flops.rows())


@needs_triton
def test_every_figure_of_the_paper(figures: list[flops.Row]) -> None:
    off = {(row.resolution, row.model): abs(row.counted / row.paper - 1) for row in figures}
    assert len(off) == 25 and max(off.values()) < 0.003, off
    known = {name: share for name, share in off.items() if not name[1].startswith(RIVALS)}
    assert len(known) == 13 and sum(share < 0.001 for share in known.values()) >= 12, known
    assert sum(share < 0.0012 for share in off.values()) >= 23, off


@needs_triton
def test_true_counts_what_the_paper_leaves_out(figures: list[flops.Row]) -> None:
    """Q' and K' take 2 d^2 for each of N tokens in each of 9 blocks, and the convolution 9 taps of 15."""
    for row in figures:
        if row.model.startswith("DiG"):
            continue
        if not row.model.startswith("DyDi"):
            assert row.true == row.counted
            continue
        config = flops.config_named(row.model)
        d, layers = config.dim, 9 * (row.resolution // 16) ** 2
        projections, taps = layers * 2 * d**2, -6 * layers * d
        tables = 2 * config.num_projectors + 4 * config.num_kernel_factors
        tables += (2 if config.differential == "map" else 4) * config.num_differential_factors
        expected = (projections + taps + layers * d * tables) / 1e9
        assert row.true - row.counted == pytest.approx(expected, rel=1e-9)


@needs_triton
def test_true_counts_what_fused_functions_of_dig_compute(figures: list[flops.Row]) -> None:
    """SwiGLU's last projection, and of each chunk of C tokens and head of width e the products, C C e or C e e each."""
    for row in figures:
        if row.model.startswith("DiG"):
            config, tokens = flops.config_named(row.model), (row.resolution // 16) ** 2
            width, hidden = config.dim // config.num_heads, int(config.ffn_ratio * config.dim)
            scores_and_values, states = 2 * 16 * config.dim, 2 * width * config.dim
            expected = config.depth * tokens * (hidden * config.dim + scores_and_values + states) / 1e9
            assert row.true - row.counted == pytest.approx(expected, rel=1e-9)


def test_the_models_are_those_of_the_paper() -> None:
    with flops.PAPER.open(newline="") as file:
        for figure in csv.DictReader(file):
            config = flops.config_named(figure["model"])
            assert config.dim == int(figure["dim"])
            assert figure["blocks"] in ("", str(config.depth)), figure  # the paper does not say how many all have
    assert flops.config_named("DyDi-LiT-S map-wise").differential == "map"
    assert flops.config_named("Sana-L") == config_of("sana", "L")


@needs_triton
def test_a_model_without_our_operators_is_counted_as_with_numbers() -> None:
    config = config_of("sana", "tiny")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        DiffusionTransformer(config)(torch.randn(1, 4, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    assert flops.gflops(config, 64) == (counter.get_total_flops() / 2e9,) * 2


@needs_triton
def test_prints_csv(capsys: pytest.CaptureFixture[str], figures: list[flops.Row]) -> None:
    flops.print_csv(figures)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "table,resolution,model,paper,counted,true"
    assert lines[1].startswith("1,256,DiT-S,6.06,6.05")
    assert len(lines) == 26
    for line, row in zip(csv.reader(lines[1:]), figures, strict=True):
        assert float(line[4]) == pytest.approx(row.counted, abs=1e-4)
        assert float(line[5]) == pytest.approx(row.true, abs=1e-4)


@needs_triton
def test_prints_a_table(capsys: pytest.CaptureFixture[str], figures: list[flops.Row]) -> None:
    flops.print_table(figures)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["Table", "resolution", "model", "paper", "counted", "difference", "true"]
    assert lines[6].split() == ["1", "256", "DyDi-LiT-S", "5.98", "5.979", "-0.02%", "6.722"]
    assert "multiplication" in lines[26]


@needs_triton
@pytest.mark.slow
def test_the_command_needs_no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, "-m", "examples.dydi_lit.flops", "--csv"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 26


def test_without_triton_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "TRITON", None)
    monkeypatch.setattr(sys, "argv", ["flops"])
    with pytest.raises(SystemExit) as stop:
        flops.main()
    assert str(stop.value).startswith("error: ")
    assert "pip install dydila-kernels[triton]" in str(stop.value)
