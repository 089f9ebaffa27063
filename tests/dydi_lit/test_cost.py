"""The cost of a denoising step: its rows, and the picture drawn from them."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("examples.dydi_lit")

from benchmarks.harness import CheckFailed, Row, in_fresh_process, read_rows
from dydila_kernels.functional import why_not_triton
from examples.dydi_lit import cost
from examples.dydi_lit.cost import MODELS, CostConfig

COUNTING = why_not_triton(torch.device("meta"), torch.float32) is None


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["cost", *map(str, arguments)])
    cost.main()


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own takes seconds to start, and matters to the figures of memory only."""
    monkeypatch.setattr(cost, "in_fresh_process", lambda function, *arguments: function(*arguments))


def test_rows_say_what_was_measured(in_this_process: None) -> None:
    config = CostConfig(size="toy", resolutions=(32, 64), device="cpu", repeats=2)
    rows = list(cost.rows(config))
    assert [(row["resolution"], row["model"]) for row in rows] == [
        (resolution, model) for resolution in (32, 64) for model in MODELS
    ]
    for row in rows:
        assert row["q10_ms"] <= row["median_ms"] <= row["q90_ms"] and row["median_ms"] > 0
        assert (row["dtype"], row["size"], row["batch"], row["repeats"]) == ("float32", "toy", 1, 2)
        assert row["tokens"] == (row["resolution"] // 8) ** 2
        assert {"commit", "torch", "device", "threads", "date"} <= row.keys()
        if COUNTING:
            assert 0 < row["gflops"] <= row["gflops_true"]


def test_command_writes_rows_and_draws_them_again(
    in_this_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "cost.jsonl"
    run(monkeypatch, "--output", output, "--size", "toy", "--resolutions", 32, "--repeats", 1, "--device", "cpu")
    rows = read_rows(output)
    assert [row["model"] for row in rows] == list(MODELS)
    picture = output.with_suffix(".png")
    assert Image.open(picture).height == 432
    picture.unlink()
    printed = capsys.readouterr().out
    assert "32 DyDi-LiT" in printed and f"wrote {output} and {picture}" in printed

    monkeypatch.setattr(cost, "rows", None)  # nothing is measured
    run(monkeypatch, "--output", output, "--no-measure")
    assert picture.exists() and read_rows(output) == rows


def test_what_does_not_fit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(call: object, device: str) -> float:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(cost, "peak_growth_mib", no_memory)
    assert cost.peak_mib("sana", "toy", 64, "cpu", "float32") is None
    facts = {"device": "CPU", "dtype": "float32", "threads": 1, "torch": "2", "size": "S"}
    absent: Row = {"model": "dit", "resolution": 64, "median_ms": None, "peak_mib": None, "gflops": None}
    present = {"model": "sana", "resolution": 64, "median_ms": 1, "q10_ms": 1, "q90_ms": 2, "peak_mib": 1, "gflops": 1}
    assert cost.line_of(absent).split() == ["64", "DiT", "-", "ms", "-", "MiB", "-", "GFLOPs"]
    cost.draw([absent | facts, present | facts], tmp_path / "cost.png")
    assert Image.open(tmp_path / "cost.png").width == 3 * 444
    cost.draw([absent | facts, present | facts | {"peak_mib": None, "gflops": None}], tmp_path / "cost.png")
    assert Image.open(tmp_path / "cost.png").width == 444


def test_nothing_is_timed_where_the_attention_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cost, "layer_error_ratio", lambda attention: 3.0)
    monkeypatch.setattr(cost, "interleave", None)
    config = CostConfig(tmp_path / "cost.jsonl", size="toy", resolutions=(32,), device="cpu")
    with pytest.raises(CheckFailed):
        next(cost.rows(config))
    with pytest.raises(SystemExit, match="error: our error is 3 times"):
        run(monkeypatch, "--size", "toy", "--device", "cpu", "--output", tmp_path / "cost.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"resolutions": (256, 100)}, "resolutions must be multiples of 16; got 100"),
        ({"repeats": 0}, "repeats must be at least 1; got 0"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
    ],
)
def test_bad_options_are_reported(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CostConfig(**changes)  # type: ignore[arg-type]


def test_drawing_needs_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"error: .*cost\.jsonl"):
        run(monkeypatch, "--no-measure", "--output", tmp_path / "cost.jsonl")


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    sizes = (128, 512)
    small, large = (in_fresh_process(cost.peak_mib, "dydi-lit", "toy", size, "cpu", "float32") for size in sizes)
    assert small is large is None or large > small + 10  # 4096 tokens of 64 channels are one MiB
