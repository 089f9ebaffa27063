"""The picture of t-SNE: which classes and images it shows, and that near ones stay near."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("examples.dydi_lit")

from PIL import Image

from examples.dydi_lit import tsne
from examples.dydi_lit.data import DataError
from examples.dydi_lit.tsne import TsneConfig, nearest_classes, plane


def write(file: Path, classes: int = 6, per_class: int = 12, spread: float = 4.0) -> Path:
    """Images of 4x4 pixels around one shade for each class: 0, 40, 80 and so on; the last class is near the first."""
    random = np.random.default_rng(0)
    labels = np.arange(classes * per_class) % classes
    shades = np.where(labels == classes - 1, 6, labels * 40)
    noise = random.normal(0, spread, (len(labels), 4, 4, 3))
    images = (shades[:, None, None, None] + 20 + noise).clip(0, 255).astype(np.uint8)
    np.savez(file, arr_0=images, arr_1=labels)
    return file


def test_the_picture_has_a_panel_for_each_file_and_row(tmp_path: Path) -> None:
    files = (write(tmp_path / "one.npz"), write(tmp_path / "two.npz", spread=60.0))
    config = TsneConfig(files, tmp_path / "new" / "tsne.png", classes=3, per_class=10)
    figure = tsne.draw(config)
    panels = [axes for axes in figure.axes if axes.collections]
    assert len(panels) == 4
    for axes in panels:
        assert [len(points.get_offsets()) for points in axes.collections] == [10, 10, 10]
    titles = [axes.get_title() for axes in panels]
    assert [title.split("\n")[0] for title in titles] == [
        "one, random classes", "two, random classes", "one, similar classes", "two, similar classes",
    ]  # fmt: skip
    silhouettes = [float(title.rpartition(" ")[2]) for title in titles]
    assert silhouettes[0] > 0.7 > silhouettes[1] + 0.2  # the second file's classes overlap
    shown = [text.get_text() for text in panels[3].get_legend().get_texts()]
    assert shown == ["class 0", "class 1", "class 5"]
    with Image.open(config.output) as picture:
        assert picture.width > 600
    again = tsne.draw(config)
    assert np.array_equal(again.axes[0].collections[0].get_offsets(), figure.axes[0].collections[0].get_offsets())


def test_similar_classes_may_be_named(tmp_path: Path) -> None:
    figure = tsne.draw(TsneConfig((write(tmp_path / "x.npz"),), tmp_path / "x.png", "pixels", 2, (4, 2), per_class=5))
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["class 4", "class 2"]


def test_nearest_classes_are_a_chain_of_the_closest() -> None:
    places = torch.tensor([0.0, 10.0, 11.0, 30.0, 13.0])
    labels = torch.arange(5).repeat(4)
    features = torch.stack([places[labels], torch.zeros(20)], 1).double()
    assert nearest_classes(features, labels + 3, 2) == [4, 5]
    assert nearest_classes(features, labels + 3, 3) == [4, 5, 7]
    assert nearest_classes(features, labels + 3, 5) == [3, 4, 5, 6, 7]


def test_clusters_stay_apart_in_the_plane() -> None:
    centres = torch.randn(3, 20, dtype=torch.float64) * 10
    labels = torch.arange(60) % 3
    points = torch.from_numpy(plane(centres[labels] + torch.randn(60, 20), 30.0, 0))
    own = torch.stack([points[labels == name].mean(0) for name in range(3)])
    assert torch.equal(torch.cdist(points, own).argmin(1), labels)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"classes": 7}, DataError, "the files have 6 classes of 5 images each, not 7"),
        ({"per_class": 13}, DataError, "the files have 0 classes of 13 images each"),
        ({"similar": (1, 9)}, DataError, r"do not all have 5 images of the classes \[9\]"),
        ({"similar": (1,)}, ValueError, "no similar classes or several"),
        ({"samples": ()}, ValueError, "at least one file"),
        ({"classes": 1}, ValueError, "classes must be at least 2; got 1"),
        ({"perplexity": 0.0}, ValueError, "perplexity must be positive; got 0"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, options: dict, error: type[Exception], message: str) -> None:
    values = {"samples": (write(tmp_path / "x.npz"),), "output": tmp_path / "x.png", "per_class": 5, "classes": 2}
    with pytest.raises(error, match=message):
        tsne.draw(TsneConfig(**(values | options)))


def test_labels_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.zeros((4, 4, 4, 3), np.uint8)
    for arrays, message in (
        ({"arr_0": images}, "with an arr_0 and an arr_1"),
        ({"arr_0": images, "arr_1": np.zeros(3, int)}, r"arr_1 of .* is int64 \(3,\); expected 4 integers"),
        ({"arr_0": images, "arr_1": np.zeros(4)}, "expected 4 integers, a label for each image"),
    ):
        np.savez(tmp_path / "x.npz", **arrays)
        monkeypatch.setattr(sys, "argv", ["tsne", str(tmp_path / "x.npz")])
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            tsne.main()
