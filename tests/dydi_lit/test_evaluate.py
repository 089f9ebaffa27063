"""FID and KID against the formulas, the images they take, what is said with them, and the digit reader."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torchmetrics
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("examples.dydi_lit")

from examples.dydi_lit import evaluate as command
from examples.dydi_lit import score
from examples.dydi_lit.checkpoint import CheckpointError
from examples.dydi_lit.configs import config_of
from examples.dydi_lit.data import DataError, digits, to_uint8
from examples.dydi_lit.evaluate import EvaluateConfig, evaluate, features_of, fid_of, kid_of, load_features, open_images
from examples.dydi_lit.model import DiffusionTransformer

FEATURES = f"{__name__}_features"


class Moments(nn.Module):
    """Mean and standard deviation of each channel: a network small enough to check by hand."""

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8 and images.shape[1] == 3 and not self.training
        return torch.cat([images.float().mean((2, 3)), images.float().std((2, 3))], 1) / 255


@pytest.fixture(autouse=True)
def features_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's, to be found by name."""
    module = type(sys)(FEATURES)
    module.moments = Moments  # type: ignore[attr-defined]
    module.number = lambda: 3  # type: ignore[attr-defined]
    module.flat = lambda: nn.Flatten(0)  # type: ignore[attr-defined]
    module.nan = lambda: nn.Sequential(Moments(), nn.Threshold(2.0, float("nan")))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, FEATURES, module)


def save_npz(file: Path, count: int, *, seed: int = 0, size: int = 8) -> Path:
    np.savez(file, np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8))
    return file


# --- figures


def fid_by_definition(first: np.ndarray, second: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), with the symmetric form of the root."""
    values, vectors = scipy.linalg.eigh(np.cov(first, rowvar=False))
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = scipy.linalg.eigvalsh(root @ np.cov(second, rowvar=False) @ root).clip(0)
    traces = np.var(first, 0, ddof=1).sum() + np.var(second, 0, ddof=1).sum()
    return float(((first.mean(0) - second.mean(0)) ** 2).sum() + traces - 2 * np.sqrt(cross).sum())


def kid_by_definition(first: np.ndarray, second: np.ndarray) -> float:
    """The unbiased estimate of the squared MMD, sum by sum."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (x @ y / len(x) + 1) ** 3

    n, m = len(first), len(second)
    within = sum(kernel(first[i], first[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within += sum(kernel(second[i], second[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return float(within - 2 * sum(kernel(x, y) for x in first for y in second) / (n * m))


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_fid_is_its_definition(offset: float) -> None:
    mix = torch.randn(6, 6, dtype=torch.float64)
    first = torch.randn(50, 6, dtype=torch.float64) @ mix + offset
    second = torch.randn(80, 6, dtype=torch.float64) + 1 + offset
    assert fid_of(first, second) == pytest.approx(fid_by_definition(first.numpy(), second.numpy()), rel=1e-9)
    assert abs(fid_of(first, first)) < 1e-9


def test_kid_is_its_definition() -> None:
    first, second = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64) + 0.3
    mean, deviation = kid_of(first, second, subsets=3, subset_size=20, seed=0)
    assert mean == pytest.approx(kid_by_definition(first.numpy(), second.numpy()), rel=1e-10)
    assert deviation == pytest.approx(0, abs=1e-12)


def test_kid_draws_its_subsets_by_the_seed() -> None:
    first, second = torch.randn(30, 5, dtype=torch.float64), torch.randn(40, 5, dtype=torch.float64)
    state = torch.random.get_rng_state()
    once = kid_of(first, second, 10, 8, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert kid_of(first, second, 10, 8, seed=1) == once != kid_of(first, second, 10, 8, seed=2)
    assert once[1] > 0


def test_equal_sets_are_no_distance_apart(tmp_path: Path) -> None:
    file = str(save_npz(tmp_path / "x.npz", 40))
    result = evaluate(EvaluateConfig(file, reference=file, features=f"{FEATURES}:moments"))
    assert abs(result.fid) < 1e-9
    assert abs(result.kid) < 1e-2 and result.kid_std < 1e-12  # unbiased, hence not exactly zero


def test_evaluation_from_files_to_figures(tmp_path: Path) -> None:
    files = [str(save_npz(tmp_path / f"{seed}.npz", 20 + seed, seed=seed)) for seed in (0, 1)]
    config = EvaluateConfig(files[0], reference=files[1], features=f"{FEATURES}:moments", batch_size=7, subset_size=20)
    result = evaluate(config)
    rows = [np.load(file)["arr_0"].astype(np.float64) / 255 for file in files]
    first, second = (np.concatenate([x.mean((1, 2)), x.std((1, 2), ddof=1)], 1) for x in rows)
    assert result.fid == pytest.approx(fid_by_definition(first, second), rel=1e-4)  # the features are float32
    assert (result.num_samples, result.num_reference, result.num_features) == (20, 21, 6)
    assert evaluate(config) == result == evaluate(replace(config, subset_size=None))


def test_pixels_of_digits() -> None:
    result = evaluate(EvaluateConfig("digits-held-out", reference="digits", subsets=3))
    images = [to_uint8(digits(part).tensors[0]).reshape(-1, 64) / 255 for part in ("held-out", "train")]  # type: ignore[arg-type]
    assert result.fid == pytest.approx(fid_by_definition(*images), rel=1e-4)
    assert (result.features, result.num_features, result.image_shape) == ("pixels", 64, (1, 8, 8))


# --- images


def test_grey_images_stored_as_colour_are_grey(tmp_path: Path) -> None:
    images = to_uint8(digits("held-out").tensors[0])
    np.savez(tmp_path / "grey.npz", images)
    np.savez(tmp_path / "colour.npz", np.repeat(images, 3, axis=3))
    config = EvaluateConfig("digits-held-out", reference="digits", subsets=3)
    expected = evaluate(config)
    for name in ("grey", "colour"):
        result = evaluate(replace(config, samples=str(tmp_path / f"{name}.npz")))
        assert (result.fid, result.kid, result.num_features) == (expected.fid, expected.kid, 64)
    with pytest.raises(DataError, match="has coloured images"):
        evaluate(EvaluateConfig(str(save_npz(tmp_path / "x.npz", 5)), reference="digits"))


def test_networks_see_grey_images_in_three_channels() -> None:
    assert features_of(open_images("digits-held-out"), Moments().eval(), 100)["features"].shape == (360, 6)


def test_folder_of_images(tmp_path: Path) -> None:
    images = np.load(save_npz(tmp_path / "x.npz", 6))["arr_0"]
    for number, image in enumerate(images):
        file = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    found = open_images(str(tmp_path / "images"))
    assert (found.count, found.shape) == (6, (3, 8, 8))
    assert np.array_equal(found.read(1, 5).permute(0, 2, 3, 1), images[[2, 4, 1, 3]])
    assert open_images(str(tmp_path / "images"), 4).read(0, 6).shape == (6, 3, 4, 4)

    Image.new("RGB", (9, 8)).save(tmp_path / "images" / "b" / "wide.png")
    with pytest.raises(DataError, match=r"wide\.png has .*\(3, 8, 9\), but .* has \(3, 8, 8\); --image-size"):
        open_images(str(tmp_path / "images")).read(0, 7)
    assert len(open_images(str(tmp_path / "images"), 8).read(0, 7)) == 7
    (tmp_path / "images" / "b" / "wide.png").write_text("no image")
    with pytest.raises(DataError, match=r"cannot read .*wide\.png"):  # a figure of fewer images would be another figure
        open_images(str(tmp_path / "images"), 8).read(0, 7)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "cannot read .* as an .npz"),
        (b"PK\x03\x04 cut off", "cannot read .* as an .npz"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "with an arr_0"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, r"is float32 \(2, 8, 8, 3\); expected uint8"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"is uint8 \(2, 3, 8, 8\); expected uint8"),
        ({"arr_0": np.zeros((8, 8, 3), np.uint8)}, "expected uint8"),
        (None, "no images at .*: expected an .npz, a folder of images, or digits"),
    ],
)
def test_files_that_hold_no_images(tmp_path: Path, content: bytes | dict | None, message: str) -> None:
    file = tmp_path / "x.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.savez(file, **content)
    with pytest.raises(DataError, match=message):
        open_images(str(file))


def test_a_plain_array_is_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match="with an arr_0"):
        open_images(str(tmp_path / "x.npy"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no images in .*empty"):
        open_images(str(tmp_path / "empty"))


# --- arguments


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    ten, one, large = (
        str(save_npz(tmp_path / f"{name}.npz", count, size=size))
        for name, count, size in [("ten", 10, 8), ("one", 1, 8), ("large", 10, 16)]
    )
    config = EvaluateConfig(ten, reference=ten, features=f"{FEATURES}:moments")
    for change, message in [
        ({"reference": large}, r"differ in height and width: \(8, 8\) in .*ten.npz, \(16, 16\) in .*large.npz"),
        ({"samples": one}, "at least 2 images are needed on each side; got 1 and 10"),
        ({"subset_size": 11}, "subset_size must be between 2 and the smaller number of images, 10; got 11"),
        ({"subset_size": 1}, "subset_size must be between 2"),
        ({"subsets": 0}, "subsets must be at least 1; got 0"),
        ({"image_size": 0}, "image_size must be at least 1; got 0"),
        ({"features": None}, "--features is needed with this reference.*ADM evaluator.*evaluator.py REFERENCE.npz"),
        ({"features": "moments"}, "must be package.module:name or pixels; got 'moments'"),
        ({"features": "no.such.module:x"}, "cannot import the features 'no.such.module:x': No module named"),
        ({"features": f"{FEATURES}:other"}, "cannot import the features .*other"),
        ({"features": f"{FEATURES}:number"}, "must return a torch module; it returned int"),
        ({"features": f"{FEATURES}:flat"}, r"must be a tensor \(n, d\), one row to an image; 10 images gave \(1920,\)"),
        ({"features": f"{FEATURES}:nan"}, r"features of .*ten.npz are not all finite"),
    ]:
        with pytest.raises(DataError, match=message):
            evaluate(replace(config, **change))  # type: ignore[arg-type]


def test_features_are_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_features_of_a_test.py").write_text("import torch\n\ndef flat():\n    return torch.nn.Flatten()\n")
    monkeypatch.syspath_prepend(tmp_path)  # as python -m does with the current folder
    assert isinstance(load_features("own_features_of_a_test:flat"), nn.Flatten)
    assert not load_features("own_features_of_a_test:flat").training


# --- the command


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    command.main()


def test_every_figure_comes_with_its_evaluator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "x.npz", to_uint8(digits("held-out").tensors[0][:50]))
    run_command(monkeypatch, tmp_path / "x.npz", "--reference", "digits", "--json", tmp_path / "new" / "x.json")
    printed = capsys.readouterr().out
    for line in printed.splitlines()[:2]:
        assert line[:3] in ("FID", "KID") and f"torchmetrics {torchmetrics.__version__}, features pixels (64)" in line
    assert "of 50 images in" in printed and "against 1437 in digits" in printed and "100 subsets of 50" in printed
    assert "50 images cannot give a covariance of 64 features full rank" in printed
    assert "holds all 50 images" in printed
    stored = json.loads((tmp_path / "new" / "x.json").read_text())
    assert f"FID {stored['fid']:.4f}" in printed and f"KID {stored['kid']:.6f}" in printed
    assert stored["evaluator"] == f"torchmetrics {torchmetrics.__version__}" and len(stored["notes"]) == 2


def test_no_notes_where_there_is_nothing_to_note() -> None:
    assert not evaluate(EvaluateConfig("digits-held-out", reference="digits", subset_size=100)).notes


def test_help_and_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(monkeypatch, "--help")
    assert ended.value.code == 0 and "--features" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: no images at .*nowhere") as ended:
        run_command(monkeypatch, "nowhere", "--reference", "digits")
    assert "\n" not in str(ended.value.code)


# --- the reader of digits


def test_reader_reads_real_digits_and_notices_copies() -> None:
    reader = score.Reader()
    images, labels = digits("held-out").tensors
    real = reader.score(images, labels)
    assert real.count == 360 and real.read_right > 0.97 and real.to_training > 0
    assert reader.score(images, (labels + 1) % 10).read_right < 0.02
    assert reader.score(*digits("train")[:100]).to_training == 0
    assert reader.score(images[:1].expand(20, -1, -1, -1), labels[:1].expand(20)).within_class == 0


def write_checkpoint(folder: Path, kind: str) -> Path:
    """What scoring needs of a checkpoint, of an untrained model."""
    config = config_of("dydi-lit", "tiny", dim=16, depth=1, in_channels=1, num_classes=10, learn_sigma=False)
    DiffusionTransformer(config).save_pretrained(folder)
    data = {"kind": kind, "size": 8, "class_names": [*"0123456789"]}
    (folder / "training.json").write_text(json.dumps({"steps_done": 1, "train": {}, "data": data}))
    return folder


def test_scores_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = score.ScoreConfig(write_checkpoint(tmp_path, "digits"), per_class=2, steps=2, guidance=2.0)
    scores = score.score(config)
    assert list(scores) == ["real, held out", "generated, no guidance", "generated, guidance 2"]
    assert [row.count for row in scores.values()] == [360, 20, 20]
    assert scores == score.score(config) != score.score(replace(config, seed=2))
    monkeypatch.setattr(sys, "argv", ["score", str(tmp_path), "--per-class", "2", "--steps", "2", "--guidance", "2"])
    score.main()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in printed if line.startswith(("real", "generated"))] == list(scores)


def test_only_digits_can_be_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "latents", "latents")
    with pytest.raises(CheckpointError, match=r"only models of digits can be scored: .* was trained on latents"):
        score.score(score.ScoreConfig(folder))
    for arguments, message in [
        ([tmp_path / "nowhere"], r"error: no checkpoint at .*nowhere"),
        ([folder, "--per-class", 1], "error: per_class must be at least 2"),
    ]:
        monkeypatch.setattr(sys, "argv", ["score", *map(str, arguments)])
        with pytest.raises(SystemExit, match=message):
            score.main()
