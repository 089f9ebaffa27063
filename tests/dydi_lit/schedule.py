"""The noise of DiT's process, written a second time, in Python's floats."""

from __future__ import annotations

import math

import torch

EPS = torch.finfo(torch.float32).eps
SIZE = 4
"""Height and width of the images of the tests."""


def beta(t: int) -> float:
    return 1e-4 + (2e-2 - 1e-4) * t / 999


ALPHA_BAR = [math.prod(1 - beta(s) for s in range(t + 1)) for t in range(1000)]
"""The share of the signal's variance left in x_t."""
