"""sFID, sKID, inception score, precision and recall against their formulas; FID and KID are in test_evaluate.py."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("examples.dydi_lit")

from torch import Tensor, nn

from examples.dydi_lit import evaluate as command
from examples.dydi_lit import metrics
from examples.dydi_lit.data import DataError
from examples.dydi_lit.evaluate import EvaluateConfig, evaluate
from examples.dydi_lit.metrics import fid_of, inception_score_of, kid_of, precision_and_recall_of

FEATURES = f"{__name__}_features"


class Whole(nn.Module):
    """All three kinds of features of an image of 4x4 pixels, small enough to check by hand."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        values = images.float() / 255
        return {"features": values.mean((2, 3)), "spatial": values[:, :1].flatten(1), "logits": values[:, :, 0, 0] * 8}


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> EvaluateConfig:
    """Two files of 60 and 50 images, and a network for them."""
    module = type(sys)(FEATURES)
    module.whole = Whole  # type: ignore[attr-defined]
    module.wrong = lambda: Returns({"features": torch.zeros(60, 2), "pooled": torch.zeros(60, 2)})  # type: ignore[attr-defined]
    module.none = lambda: Returns({"logits": torch.zeros(60, 2)})  # type: ignore[attr-defined]
    module.flat = lambda: Returns({"features": torch.zeros(60, 2), "logits": torch.zeros(60)})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, FEATURES, module)
    random = np.random.default_rng(0)
    for name, count in (("samples", 60), ("real", 50)):
        np.savez(tmp_path / f"{name}.npz", random.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8))
    files = [str(tmp_path / f"{name}.npz") for name in ("samples", "real")]
    return EvaluateConfig(files[0], reference=files[1], features=f"{FEATURES}:whole", subsets=5, subset_size=20)


class Returns(nn.Module):
    def __init__(self, found: dict[str, Tensor]) -> None:
        super().__init__()
        self.found = found

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.found


def covered_by_definition(points: Tensor, by: Tensor, k: int) -> float:
    """One distance after the other."""
    radii = [
        sorted(float((one - other).norm()) for j, other in enumerate(by) if j != i)[k - 1] for i, one in enumerate(by)
    ]
    inside = [
        any(float((point - one).norm()) <= radius for one, radius in zip(by, radii, strict=True)) for point in points
    ]
    return sum(inside) / len(points)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("rows", [4, 500])
def test_precision_and_recall_are_their_definition(monkeypatch: pytest.MonkeyPatch, k: int, rows: int) -> None:
    monkeypatch.setattr(metrics, "_ROWS", rows)
    torch.manual_seed(k)
    generated, real = torch.randn(25, 2, dtype=torch.float64) * 1.5 + 1, torch.randn(18, 2, dtype=torch.float64)
    precision, recall = precision_and_recall_of(generated, real, k)
    assert precision == pytest.approx(covered_by_definition(generated, real, k))
    assert recall == pytest.approx(covered_by_definition(real, generated, k))
    assert 0 < precision < 1 and 0 < recall < 1 and precision != recall


def test_precision_and_recall_at_their_ends() -> None:
    """Copies are covered, also far from zero; what lies apart is not; one mode is precise and recalls little."""
    torch.manual_seed(0)
    real = torch.randn(40, 3, dtype=torch.float64) + 1e6
    assert precision_and_recall_of(real.clone(), real, 3) == (1, 1)
    assert precision_and_recall_of(real + 1e3, real, 3) == (0, 0)
    mode = real[:1] + torch.randn(40, 3, dtype=torch.float64) * 1e-3
    precision, recall = precision_and_recall_of(mode, real, 3)
    assert precision == 1 and recall <= 0.05


@pytest.mark.parametrize("parts", [1, 4])
def test_inception_score_is_its_definition(parts: int) -> None:
    """Parts of equal images have equal scores, whoever deals them out."""
    torch.manual_seed(0)
    logits = torch.randn(8, 5, dtype=torch.float64) * 3
    p = torch.softmax(logits, 1).numpy()
    expected = float(np.exp(np.mean((p * np.log(p / p.mean(0))).sum(1))))
    score, deviation = inception_score_of(logits, 1, seed=0)
    assert score == pytest.approx(expected) and deviation == 0
    sure = torch.eye(4, dtype=torch.float64).repeat(20, 1) * 50
    score, deviation = inception_score_of(sure, parts, seed=0)
    assert score == pytest.approx(4, rel=0.2) and (deviation == 0) == (parts == 1)
    state = torch.random.get_rng_state()
    assert inception_score_of(sure, parts, seed=0) == (score, deviation)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_all_figures_of_one_network(config: EvaluateConfig) -> None:
    result = evaluate(config)
    samples, real = (
        torch.from_numpy(np.load(file)["arr_0"]).permute(0, 3, 1, 2).float() / 255
        for file in (config.samples, config.reference)
    )
    spatial = [images[:, :1].flatten(1).double() for images in (samples, real)]
    pooled = [images.mean((2, 3)).double() for images in (samples, real)]
    logits = (samples[:, :, 0, 0] * 8).double()
    assert result.sfid == pytest.approx(fid_of(*spatial)) and result.fid == pytest.approx(fid_of(*pooled))
    assert (result.skid, result.skid_std) == pytest.approx(kid_of(*spatial, 5, 20, 0))
    assert (result.inception_score, result.inception_score_std) == pytest.approx(inception_score_of(logits, 1, 0))
    assert (result.precision, result.recall) == precision_and_recall_of(*pooled, 3)
    assert result.parts == 1 and evaluate(replace(config, part_size=20)).parts == 3
    assert evaluate(replace(config, neighbours=50)).precision is None  # of 50 images none has 50 others


@pytest.mark.parametrize(
    "name, message",
    [
        ("wrong", "must return features and may return spatial and logits; got features, pooled"),
        ("none", "must return features and may return spatial and logits; got logits"),
        ("flat", r"logits must be a tensor \(n, d\), one row to an image; 60 images gave \(60,\)"),
    ],
)
def test_networks_that_return_something_else(config: EvaluateConfig, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(replace(config, features=f"{FEATURES}:{name}"))


def test_what_is_printed(
    config: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--features", config.features, "--json", str(tmp_path / "x.json"), "--part-size", "20"]
    monkeypatch.setattr(sys, "argv", ["evaluate", config.samples, "--reference", config.reference, *options])
    command.main()
    printed = capsys.readouterr().out.splitlines()
    names = ["FID", "KID", "sFID", "sKID", "IS", "precision", "recall"]
    assert [line.split(" ")[0] for line in printed[:7]] == names
    assert all(f"{FEATURES}:whole" in line and "float64" in line for line in printed[:7])
    assert all("torchmetrics" in line for line in printed[:5]) and "3 parts" in printed[4]
    assert all("examples.dydi_lit.metrics" in line and "radius to neighbour 3" in line for line in printed[5:7])
    stored = json.loads((tmp_path / "x.json").read_text())
    assert f"recall {stored['recall']:.4f}" in printed[6] and stored["parts"] == 3

    monkeypatch.setattr(
        sys, "argv", ["evaluate", config.samples, "--reference", config.reference, "--features", "pixels"]
    )
    command.main()
    assert "left out: sFID, sKID, IS (no spatial features or logits, or too few images)" in capsys.readouterr().out
