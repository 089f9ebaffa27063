"""Images that only attention can explain: every texture occurs twice, anywhere.

An image is a grid of 8 x 8 tiles of 4 x 4 pixels, a tile to a token. There are 32 textures of independent pixels, -1 or
1, each in two tiles drawn at random. Within a tile nothing can be inferred from one pixel about another; what is to be
known of a noisy pixel, beside its own value, stands in the twin of its tile, at no fixed distance. So a denoiser either
matches tiles by their contents, or it does not, and two errors say how far it gets: that of the best denoiser that sees
each pixel alone, and that of the best that knows where the twin is.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from examples.dydi_lit.data import DataKind, ImageData

GRID, TILE = 8, 4
TRAINING, HELD_OUT = 20000, 256
"""Images to train on, and those kept from training; seeds 0 and 1."""


def twins(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 32, 32) int8 of -1 and 1, and the place of each tile's twin, (count, 64) int64."""
    generator, tiles = np.random.default_rng(seed), GRID**2
    textures = generator.integers(0, 2, (count, tiles // 2, TILE, TILE), np.int8) * 2 - 1
    places = generator.permuted(np.tile(np.arange(tiles), (count, 1)), axis=1)  # of each texture, two in a row
    images, partners = np.empty((count, tiles, TILE, TILE), np.int8), np.empty_like(places)
    rows = np.arange(count)[:, None]
    for own, other in ((places[:, ::2], places[:, 1::2]), (places[:, 1::2], places[:, ::2])):
        images[rows, own], partners[rows, own] = textures, other
    grid = images.reshape(count, GRID, GRID, TILE, TILE).swapaxes(2, 3)
    return torch.from_numpy(grid.reshape(count, 1, GRID * TILE, GRID * TILE).copy()), torch.from_numpy(partners)


class TwinData(ImageData):
    """Those to train on. Mirrored ones are as good as others."""

    kind: DataKind = "twins"
    channels = 1
    size = GRID * TILE
    network: ClassVar[dict[str, Any]] = {"patch_size": TILE, "feed_forward": "mlp", "ffn_ratio": 4.0}
    """The same feed-forward for all, wide enough for what a tile says of itself: attention makes the difference."""

    def __init__(self) -> None:
        self.class_names = ["twins"]
        self.images, _ = twins(TRAINING, 0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], 0

    def to_images(self, batch: Tensor, flip: Tensor, noise: Tensor) -> Tensor:
        return torch.where(flip[:, None, None, None], batch.flip(-1), batch).float()


def bounds(noisy: Tensor, noise: Tensor, partners: Tensor, alpha_bar: float) -> tuple[float, float]:
    """Mean squared errors of the noise in noisy (n, 1, 32, 32) as the best denoisers predict it.

    Of a pixel alone, E[pixel | x] = tanh(a x / s^2), with a^2 = alpha_bar and s^2 = 1 - alpha_bar; knowing its twin x'
    too, tanh(a (x + x') / s^2).
    """
    a, s = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    tiles = noisy.unfold(2, TILE, TILE).unfold(3, TILE, TILE).reshape(len(noisy), GRID**2, TILE, TILE)
    others = tiles.gather(1, partners[:, :, None, None].expand_as(tiles))
    shape = (len(noisy), 1, GRID, GRID, TILE, TILE)
    seen = [x.view(shape).transpose(3, 4).reshape(noisy.shape) for x in (tiles, tiles + others)]
    errors: list[Any] = [((noisy - a * torch.tanh(a * x / s**2)) / s - noise).square().mean().item() for x in seen]
    return errors[0], errors[1]
