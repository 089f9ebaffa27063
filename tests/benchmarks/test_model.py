"""The suite of whole models: a denoising step and a training step."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import tyro

pytest.importorskip("diffusers", reason="the models need the extra 'examples'")

from benchmarks import harness, model, suite


def case(name: str = "dydi-lit", mode: suite.Mode = "forward", image: int = 64, batch: int = 2) -> model.Case:
    return model.Case(name, "tiny", mode, batch, image, "cpu", torch.float32)


def test_a_smoke_run_measures_every_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    returned = model.main(model.Config(device="cpu", smoke=True, threads=1, out=tmp_path))
    rows = harness.read_rows(tmp_path / "model.jsonl")
    assert rows == returned and suite.exit_code(rows) == 0
    cells = [(row["name"], row["mode"], row["image"], row["tokens"]) for row in rows]
    assert sorted(cells) == sorted(
        (name, mode, image, tokens)
        for name in ("dydi-lit", "sana", "dit")
        for mode in ("forward", "forward+backward")
        for image, tokens in ((64, 16), (256, 256))
    )
    for row in rows:
        assert row["skipped"] is None and 0 < row["q10_ms"] <= row["median_ms"] <= row["q90_ms"]
        assert row.get("error_ratio", 0) <= 2 and ("error_ratio" in row) == (row["name"] == "dydi-lit")
        assert row["peak_mib"] is None or 0 <= row["peak_mib"] < 1000
    assert "mode forward+backward, dim 128" in capsys.readouterr().out


def test_images_are_in_pixels_by_either_name_of_the_option() -> None:
    for option in ("--images", "--sizes"):
        assert tyro.cli(model.Config, args=[option, "512", "1024", "--device", "cpu"]).sizes == (512, 1024)
    for image, tokens in ((256, 256), (1024, 4096)):
        for comparison in model.comparisons(model.Config(device="cpu", sizes=(image,))):
            for contender in comparison:
                assert (contender.labels["image"], contender.labels["tokens"]) == (image, tokens)
                assert contender.labels["batch"] == 1


def test_images_that_do_not_divide_into_patches_are_refused() -> None:
    for images in ((256, 250), (0,)):
        with pytest.raises(ValueError, match=f"multiples of 16 pixels a side; got {images[-1]}"):
            model.Config(device="cpu", sizes=images).images(on_cpu=3)


def test_gradients_are_of_all_that_trains_and_not_zero() -> None:
    """Blocks that start as the identity would pass on zeros, which a GPU multiplies faster."""
    network = model.network("dydi-lit", "tiny", True, False, "cpu", torch.float32)
    gradients = model.prepare(case(mode="forward+backward"))()
    assert isinstance(gradients, tuple)
    assert len(gradients) == sum(parameter.requires_grad for parameter in network.parameters())
    assert all(gradient.any() for gradient in gradients)


def test_a_training_step_counts_three_forward_passes_of_each_image() -> None:
    pytest.importorskip("triton", reason="its operators are what is counted")
    one, step = model.cost(case(batch=1)), model.cost(case(mode="forward+backward", batch=2))
    assert one is not None and step is not None
    assert step.flops == pytest.approx(6 * one.flops) and one.flops > 0
    assert 3 * one.bytes < step.bytes < 6 * one.bytes  # the weights are read once for both images


def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "layer_error_ratio", lambda *_, **__: math.nan)
    rows = model.main(model.Config(device="cpu", smoke=True, threads=1, modes=("forward",), models=("dydi-lit",)))
    assert suite.exit_code(rows) == 1 and not any("median_ms" in row for row in rows)
