"""The pictures of the example: two PNG files, and digits as text for a terminal; no screen is needed."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor


def save_grid(images: Tensor, path: Path, *, columns: int) -> None:
    """Writes images (n, 1, height, width) in -1..1 row by row, `columns` to a row, -1 black and 1 white."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(0.6 * columns, 0.6 * rows), layout="constrained")
    for axes, image in zip(figure.subplots(rows, columns, squeeze=False).flat, images.cpu().numpy(), strict=False):
        axes.imshow(image[0], cmap="gray", vmin=-1, vmax=1)
    for axes in figure.axes:
        axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def as_text(images: Tensor, *, columns: int = 5) -> str:
    """Images (n, 1, height, width) in -1..1 as lines of shades, two characters a pixel, `columns` images to a row."""
    shades = np.array(["  ", "░░", "▒▒", "▓▓", "██"])
    levels = ((images[:, 0].clamp(-1, 1) + 1) / 2 * (len(shades) - 1)).round().long().cpu().numpy()
    pixels = shades[levels]
    rows = [pixels[first : first + columns] for first in range(0, len(pixels), columns)]
    lines = ["   ".join("".join(line) for line in lines) for row in rows for lines in row.swapaxes(0, 1)]
    return "\n".join(lines)


def save_loss_curve(losses: list[float], path: Path, *, window: int = 50) -> None:
    """Writes the loss of every step, and its mean over the last `window` steps, with a logarithmic axis."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(np.arange(1, len(losses) + 1), losses, color="0.8", label="each step")
    if len(losses) >= window:
        means = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        axes.semilogy(np.arange(window, len(losses) + 1), means, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="mean squared error of the noise")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
