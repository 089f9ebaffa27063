"""Training throughput: its rows, and the table printed from them."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("examples.dydi_lit")

from benchmarks.harness import read_rows
from examples.dydi_lit import throughput
from examples.dydi_lit.throughput import ThroughputConfig


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["throughput", *map(str, arguments)])
    throughput.main()


def test_command_measures_and_prints_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "throughput.jsonl"
    options = ("--output", output, "--models", "dit", "dig", "dydi-lit", "--size", "toy", "--resolution", 64)
    run(monkeypatch, *options, "--batch-size", 2, "--rounds", 3, "--device", "cpu")
    printed = capsys.readouterr().out
    found = read_rows(output)
    assert [row["model"] for row in found] == ["dit", "dig", "dydi-lit"]
    for row in found:
        assert row["over_dit_least"] <= row["over_dit"] <= row["over_dit_most"] and row["repeats"] == 3
        assert row["images_per_second"] == pytest.approx(2000 / row["median_ms"])
        assert (row["size"], row["resolution"], row["batch"]) == ("toy", 64, 2)
        assert {"commit", "torch", "device", "threads", "date"} <= row.keys()
    assert found[0]["over_dit"] == 1
    for title in ("DiT ", "DiG", "DyDi-LiT"):
        assert f"| {title}" in printed

    monkeypatch.setattr(throughput, "rows", None)  # nothing is measured
    run(monkeypatch, "--output", output, "--no-measure")
    assert capsys.readouterr().out == printed


def test_a_step_trains() -> None:
    """All that a training step of the kit does to the weights: they move, by no more than AdamW's rate and decay."""
    config = ThroughputConfig(size="toy", resolution=64, batch_size=2, device="cpu")
    found: list[dict[str, torch.Tensor]] = []

    class Watched(throughput.DiffusionTransformer):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            found.append(dict(self.named_parameters()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "DiffusionTransformer", Watched)
        step = throughput.step_of("dydi-lit", config)
    before = {name: weight.detach().clone() for name, weight in found[0].items()}
    step()
    moved = {name: (weight - before[name]).abs().max().item() for name, weight in found[0].items()}
    assert 0 < max(moved.values()) < 1.1e-4 + 1e-6
    assert moved["output.weight"] > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--resolution", 100), "resolution must be a multiple of 16; got 100"),
        (("--rounds", 0), "rounds must be at least 1; got 0"),
        (("--batch-size", 0), "batch_size must be at least 1; got 0"),
        (("--models", "sana"), "models must hold dit, which all are compared with; got sana"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: tuple[object, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--output", tmp_path / "rows.jsonl", *arguments)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "rows.jsonl").exists()
