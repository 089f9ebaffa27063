"""Fig. 11: t-SNE of generated images, of random and of similar classes: python -m examples.dydi_lit.tsne SAMPLES...

Each SAMPLES is an .npz that `generate` wrote, with its labels; the files stand side by side, one for each model. A
network turns the images into features, in the paper a ResNet-152, and scikit-learn's t-SNE turns these into points in
the plane. The classes of the upper row are drawn at random, those of the lower one are alike: named by you, as the
paper's cats, or else those whose mean features are nearest to each other in the first file.

Over each panel stands the mean silhouette of its features, before t-SNE: near 1 where every image is far closer to its
own class than to any other, 0 where it is as close to another. t-SNE itself keeps no distances.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from torch import Tensor, nn

from examples.dydi_lit.checkpoint import plain_errors
from examples.dydi_lit.data import DataError
from examples.dydi_lit.evaluate import features_of, load_features
from examples.dydi_lit.image_sets import images_of, load_labelled
from examples.dydi_lit.parallel import processes
from examples.dydi_lit.plots import DPI, legible, save


@dataclass(frozen=True)
class TsneConfig:
    """Draw t-SNE pictures of generated images, one column a file, for random and for similar classes."""

    samples: tyro.conf.Positional[tuple[Path, ...]]
    """Files that `generate` wrote, one for each model."""
    output: Path = Path("runs/tsne.png")
    """PNG file to write."""
    features: str = "pixels"
    """Network whose features are shown, as of `evaluate`: package.module:name; or the pixels themselves."""
    classes: int = 6
    """Classes in each row."""
    similar: tuple[int, ...] = ()
    """Labels of the lower row, from 0; unless given, those whose mean features are nearest to each other."""
    per_class: int = 50
    """Images of each class."""
    perplexity: float = 30.0
    """Of t-SNE: about how many neighbours count; less where there are few images."""
    batch_size: int = 64
    """Images that features are computed of at once."""
    seed: int = 0
    """Of the random classes and of t-SNE."""

    def __post_init__(self) -> None:
        for name, least in (("classes", 2), ("per_class", 2), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
        if not self.perplexity > 0:
            raise ValueError(f"perplexity must be positive; got {self.perplexity}")
        if not self.samples or len(set(self.similar)) == 1:
            raise ValueError("give at least one file of samples, and no similar classes or several")


def draw(config: TsneConfig) -> Figure:
    """Writes `config.output` and returns the picture. DataError where a file lacks images, labels or a class."""
    network = load_features(config.features).to(processes().device)
    files = [load_labelled(file) for file in config.samples]
    known = [_known(labels, config.per_class) for _, labels in files]
    common = sorted(set.intersection(*known))
    if len(common) < config.classes:
        raise DataError(f"the files have {len(common)} classes of {config.per_class} images each, not {config.classes}")
    if missing := sorted(set(config.similar) - set(common)):
        raise DataError(f"the files do not all have {config.per_class} images of the classes {missing}")

    random = np.random.default_rng(config.seed).choice(common, config.classes, replace=False)
    similar = config.similar or nearest_classes(*_embed(config, network, files[0], common), config.classes)
    rows = {"random classes": sorted(map(int, random)), "similar classes": list(similar)}

    figure = Figure(figsize=(3.2 * len(files) + 1.1, 6.6), dpi=DPI, layout="constrained")
    grid = figure.subplots(2, len(files), squeeze=False)
    for axes_of_row, (title, classes) in zip(grid, rows.items(), strict=True):
        for axes, file, name in zip(axes_of_row, files, config.samples, strict=True):
            features, labels = _embed(config, network, file, classes)
            points = plane(features, config.perplexity, config.seed)
            for number, label in enumerate(classes):
                chosen = (labels == label).numpy()
                axes.scatter(*points[chosen].T, s=6, color=f"C{number % 10}", label=f"class {label}")
            silhouette = silhouette_score(features.numpy(), labels.numpy())
            axes.set_title(f"{legible(name.stem)}, {title}\nsilhouette {silhouette:.2f}", fontsize=8)
            axes.set(xticks=[], yticks=[])
        axes_of_row[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, config.output)
    return figure


def plane(features: Tensor, perplexity: float, seed: int) -> np.ndarray:
    """t-SNE's points (n, 2) of features (n, d); the perplexity is at most a third of the other points."""
    fitting = TSNE(perplexity=min(perplexity, (len(features) - 1) / 3), init="pca", random_state=seed)
    return fitting.fit_transform(features.float().numpy())


def nearest_classes(features: Tensor, labels: Tensor, count: int) -> list[int]:
    """`count` labels whose mean features are close: the nearest two, then always the one nearest to those chosen."""
    names = labels.unique()
    means = torch.stack([features[labels == name].mean(0) for name in names])
    distances = torch.cdist(means, means).fill_diagonal_(torch.inf)
    chosen = list(divmod(int(distances.argmin()), len(names)))
    while len(chosen) < count:
        to_chosen = distances[chosen].mean(0)  # infinite for those chosen, by the diagonal
        chosen.append(int(to_chosen.argmin()))
    return sorted(int(names[number]) for number in chosen)


def _known(labels: np.ndarray, per_class: int) -> set[int]:
    """The labels of at least `per_class` images."""
    names, counts = np.unique(labels, return_counts=True)
    return {int(name) for name, count in zip(names, counts, strict=True) if count >= per_class}


def _embed(
    config: TsneConfig, network: nn.Module, file: tuple[np.ndarray, np.ndarray], classes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Features (n, d) float64 and labels (n,) of the first images of each class."""
    images, labels = file
    chosen = np.concatenate([np.flatnonzero(labels == name)[: config.per_class] for name in classes])
    features = features_of(images_of("the chosen classes", images[chosen]), network, config.batch_size)["features"]
    return features, torch.from_numpy(labels[chosen])


def main() -> None:
    with plain_errors(ValueError):
        config = tyro.cli(TsneConfig, prog="python -m examples.dydi_lit.tsne")
        draw(config)
    print(f"wrote {config.output}")


if __name__ == "__main__":
    main()
