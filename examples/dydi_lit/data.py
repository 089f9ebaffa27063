"""The digits that ship with scikit-learn: 1797 grey images of 8x8 pixels, read from disk without a download."""

from typing import Literal

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import TensorDataset

IMAGE_SIZE = 8
NUM_CLASSES = 10
_LARGEST_PIXEL = 16
_HELD_OUT_SHARE = 0.2
_SPLIT_SEED = 0  # fixed: every run, whatever its own seed, is scored on the same held-out digits


def digits(split: Literal["train", "held-out"]) -> TensorDataset:
    """Images (n, 1, 8, 8) float32 in -1..1 and labels (n,) int64: 1437 to train on, 360 held out, classes balanced."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        np.arange(len(labels)), test_size=_HELD_OUT_SHARE, random_state=_SPLIT_SEED, stratify=labels
    )
    chosen = parts[0] if split == "train" else parts[1]
    images = torch.tensor(pixels[chosen], dtype=torch.float32).reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE)
    return TensorDataset(images / (_LARGEST_PIXEL / 2) - 1, torch.tensor(labels[chosen], dtype=torch.int64))


def to_pixels(images: Tensor) -> np.ndarray:
    """Images (n, 1, 8, 8) in -1..1 as rows (n, 64) float32 in scikit-learn's own range 0..16; values are clipped."""
    return ((images.clamp(-1, 1) + 1) * (_LARGEST_PIXEL / 2)).flatten(1).cpu().numpy()
