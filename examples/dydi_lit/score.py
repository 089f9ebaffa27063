"""Scores a trained model by reading what it draws: python -m examples.dydi_lit.score CHECKPOINT

The reader is a support vector machine trained on the real training digits, never on a generated one. Its share of
held-out real digits read right stands beside every figure for generated ones. Reading says nothing about copying or
variety, so two distances say it: how far an image is from the nearest training digit (a copy has 0), and how far two
images of one class are from each other.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from sklearn.metrics import pairwise_distances
from sklearn.svm import SVC
from torch import Tensor

from examples.dydi_lit.checkpoint import CheckpointError, load_ema_model, plain_errors, read_training
from examples.dydi_lit.data import IMAGE_SIZE, digits, to_pixels
from examples.dydi_lit.diffusion import sample, seeds_of
from examples.dydi_lit.sample import SampleConfig, labels_of


@dataclass(frozen=True)
class ScoreConfig:
    """Draw digits from a trained model, with and without guidance, and have a classifier read them."""

    checkpoint: tyro.conf.Positional[Path]
    """Folder written by training."""
    per_class: int = 20
    """Digits of each class."""
    guidance: float = SampleConfig.guidance
    """Scale of classifier-free guidance; the figures without guidance are printed beside it."""
    steps: int = SampleConfig.steps
    """Steps of the DDIM sampler."""
    seed: int = 1
    """Seed of the noise that sampling starts from."""


@dataclass(frozen=True)
class Score:
    """Figures of one set of images; distances are Euclidean, over 64 pixels in 0..16."""

    count: int
    read_right: float
    """Share read as the class asked for."""
    to_training: float
    """Median distance to the nearest training digit."""
    within_class: float
    """Median distance between two images of one class."""


class Reader:
    """A classifier fitted to the real training digits: scikit-learn's SVC with an RBF kernel, gamma = 0.001."""

    def __init__(self) -> None:
        images, labels = digits("train").tensors
        self.training_pixels = to_pixels(images)
        self.classifier = SVC(kernel="rbf", gamma=0.001).fit(self.training_pixels, labels.numpy())

    def score(self, images: Tensor, labels: Tensor) -> Score:
        """Scores images (n, 1, 8, 8) in -1..1 against the labels (n,) int64 they were asked, or known, to show."""
        pixels, asked = to_pixels(images), labels.cpu().numpy()
        classes = [pixels[asked == digit] for digit in np.unique(asked)]
        pairs = [pairwise_distances(group)[np.triu_indices(len(group), k=1)] for group in classes]
        return Score(
            count=len(pixels),
            read_right=float(np.mean(self.classifier.predict(pixels) == asked)),
            to_training=float(np.median(pairwise_distances(pixels, self.training_pixels).min(axis=1))),
            within_class=float(np.median(np.concatenate(pairs))),
        )


def score(config: ScoreConfig) -> dict[str, Score]:
    """Scores of the held-out real digits, of digits drawn without guidance, and of digits drawn with it, by name.

    Raises CheckpointError where there is no checkpoint to draw from, or one of another kind of data, and ValueError for
    fewer than two digits of a class or what `sample` refuses.
    """
    if config.per_class < 2:
        raise ValueError(f"per_class must be at least 2, to compare digits of one class; got {config.per_class}")
    if (kind := read_training(config.checkpoint)["data"]["kind"]) != "digits":
        raise CheckpointError(f"only models of digits can be scored: {config.checkpoint} was trained on {kind}")
    model, reader, labels = load_ema_model(config.checkpoint), Reader(), labels_of(config.per_class)
    seeds = seeds_of(config.seed, range(len(labels)))
    scores = {"real, held out": reader.score(*digits("held-out").tensors)}
    for guidance, name in ((1.0, "no guidance"), (config.guidance, f"guidance {config.guidance:g}")):
        images = sample(
            model,
            labels,
            size=IMAGE_SIZE,
            seeds=seeds,
            sampler="ddim",
            steps=config.steps,
            guidance=guidance,
            clip=True,
        )
        scores[f"generated, {name}"] = reader.score(images, labels)
    return scores


def print_scores(scores: dict[str, Score]) -> None:
    """Prints one row for each set of images."""
    line = "{:26}{:>7}{:>12}{:>25}{:>20}".format
    print(line("digits", "count", "read right", "to a training digit", "within a class"))
    for name, row in scores.items():
        distances = f"{row.to_training:.1f}", f"{row.within_class:.1f}"
        print(line(name, row.count, f"{row.read_right:.1%}", *distances))
    print("Read right: share read as the class asked for, by an SVC (RBF, gamma 0.001) fitted to real training digits.")
    print("Distances: medians, Euclidean over 64 pixels in 0..16; to the nearest training digit, and between any two")
    print("digits of one class.")


def main() -> None:
    with plain_errors(ValueError):
        config = tyro.cli(ScoreConfig, prog="python -m examples.dydi_lit.score")
        print_scores(score(config))


if __name__ == "__main__":
    main()
