"""Draws pictures from a trained model: python -m examples.dydi_lit.sample CHECKPOINT

With --compare, the same classes from the same noise by several models, one to a row, as in the paper's Figs. 3, 4 and 8
to 10.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from examples.dydi_lit.checkpoint import plain_errors, read_training
from examples.dydi_lit.data import NUM_CLASSES
from examples.dydi_lit.diffusion import seeds_of
from examples.dydi_lit.drawing import DrawConfig, Drawer
from examples.dydi_lit.model_card import title_of
from examples.dydi_lit.plots import save_grid

_OF_IMAGENET = (207, 360, 387, 974, 88, 979, 417, 279)
"""The classes of DiT's sample script: golden retriever, otter, lesser panda, geyser, macaw, valley, balloon, fox."""


@dataclass(frozen=True)
class SampleConfig(DrawConfig):
    """Draw pictures from a trained model and write them as one PNG, a class to a row, or a model to a row."""

    output: Path = Path("runs/samples.png")
    """PNG file to write."""
    classes: tuple[int, ...] = ()
    """Labels to draw, from 0; unless given, all where there are at most ten, and else eight of them."""
    per_class: int = 10
    """Pictures of each class."""
    compare: tuple[Path, ...] = ()
    """Checkpoints of other models of the same classes; each then has a row, and a class is a group of columns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_class < 1:
            raise ValueError(f"per_class must be at least 1; got {self.per_class}")


def labels_of(per_class: int, classes: Sequence[int] = range(NUM_CLASSES)) -> Tensor:
    """(len(classes) * per_class,) int64: the first class `per_class` times, then the second, and so on."""
    return torch.tensor(classes).repeat_interleave(per_class)


def classes_to_show(num_classes: int) -> tuple[int, ...]:
    """All classes up to ten, DiT's well known eight of ImageNet's thousand, and else the first eight."""
    if num_classes == 1000:
        return _OF_IMAGENET
    return tuple(range(num_classes if num_classes <= 10 else 8))


def draw_grid(config: SampleConfig) -> Tensor:
    """Writes `config.output` and returns the pictures in it, (n, 1 or 3, height, width) float32 in -1..1 on the CPU.

    Raises what `Drawer` raises, and ValueError for a class that the model does not have, or models of other classes.
    """
    checkpoints = [config.checkpoint, *config.compare]
    trainings = [read_training(folder) for folder in checkpoints]
    names = trainings[0]["data"]["class_names"]
    classes = config.classes or classes_to_show(len(names))
    if not all(0 <= number < len(names) for number in classes):
        raise ValueError(f"classes must be in 0..{len(names) - 1}; got {classes}")
    for folder, training in zip(checkpoints, trainings, strict=True):
        if training["data"]["class_names"] != names:
            raise ValueError(f"{folder} and {config.checkpoint} were trained on other classes")

    labels = labels_of(config.per_class, classes)
    seeds = seeds_of(config.seed, range(len(labels)))
    batches = [slice(first, first + config.batch_size) for first in range(0, len(labels), config.batch_size)]
    pictures = []
    for folder in checkpoints:
        draw = Drawer(replace(config, checkpoint=folder))
        for batch in tqdm(batches, unit="batch", desc=f"draw, guidance {config.guidance:g}"):
            pictures.append(draw(labels[batch], seeds[batch], progress=True).cpu())
    images, shown = torch.cat(pictures), [names[number] for number in classes]
    if config.compare:
        titles = [title_of(training) for training in trainings]
        save_grid(images, config.output, columns=len(labels), titles=titles, headings=shown)
    else:
        save_grid(images, config.output, columns=config.per_class, titles=shown)
    return images


def main() -> None:
    with plain_errors(ValueError):
        config = tyro.cli(SampleConfig, prog="python -m examples.dydi_lit.sample")
        draw_grid(config)
    print(f"wrote {config.output}")


if __name__ == "__main__":
    main()
