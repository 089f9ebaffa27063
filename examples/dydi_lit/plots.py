"""The pictures that training and sampling write: PNG files, and digits as text for a terminal; no screen is needed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

DPI = 120


def save_grid(
    images: Tensor,
    path: Path,
    *,
    columns: int,
    titles: Sequence[str] | None = None,
    headings: Sequence[str] | None = None,
) -> None:
    """Writes images (n, 1 or 3, height, width) in -1..1 row by row, `columns` to a row, as a PNG.

    One channel is grey, -1 black and 1 white; three are red, green and blue. Values outside -1..1 are cut. `titles`
    names the rows, `headings` equal shares of the columns; ValueError where there is no image, another number of
    channels, a title too many or too few, or headings that do not divide the columns.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"images must be (n, 1 or 3, height, width) with n at least 1; got {tuple(images.shape)}")
    rows = -(-len(images) // columns)
    if titles is not None and len(titles) != rows:
        raise ValueError(f"titles must name each of the {rows} rows; got {len(titles)}")

    if headings is not None and (not headings or columns % len(headings)):
        raise ValueError(f"headings must divide the {columns} columns; got {len(headings)}")

    # All images on one white sheet: a hundred axes would take seconds to draw.
    height, width = images.shape[-2:]
    gap = max(width // 16, 1)
    sheet = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), dtype=np.float32)
    pixels = ((images.detach().float().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()
    for number, image in enumerate(pixels):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image

    inches = max(width / DPI, 0.6)  # at least one pixel of the file for one of the image
    size = (inches * sheet.shape[1] / width, inches * sheet.shape[0] / width)
    margin = 0 if titles is None else 0.1 + 0.075 * max(map(len, titles))
    top_margin = 0 if headings is None else 0.25
    whole = size[0] + margin, size[1] + top_margin
    figure = Figure(figsize=whole, dpi=DPI)
    axes = figure.add_axes((margin / whole[0], 0, size[0] / whole[0], size[1] / whole[1]))
    axes.imshow(sheet, interpolation="nearest", aspect="auto")
    axes.set(frame_on=False, xticks=[], yticks=[])
    if titles is not None:
        axes.set_yticks([row * (height + gap) + (height - 1) / 2 for row in range(rows)], map(legible, titles))
    if headings is not None:
        share = columns // len(headings)
        middles = [((2 * number + 1) * share * (width + gap) - gap - 1) / 2 for number in range(len(headings))]
        axes.xaxis.tick_top()
        axes.set_xticks(middles, map(legible, headings))
    axes.tick_params(length=0, labelsize=8)
    save(figure, path)


def legible(name: str) -> str:
    """A name as matplotlib can write it: a dollar begins no formula, and bytes that are no UTF-8 are replaced."""
    return name.encode(errors="surrogateescape").decode(errors="replace").replace("$", r"\$")


def as_text(images: Tensor, *, columns: int = 5) -> str:
    """Images (n, 1, height, width) in -1..1 as lines of shades, two characters a pixel, `columns` images to a row."""
    shades = np.array(["  ", "░░", "▒▒", "▓▓", "██"])
    levels = ((images[:, 0].clamp(-1, 1) + 1) / 2 * (len(shades) - 1)).round().long().cpu().numpy()
    pixels = shades[levels]
    rows = [pixels[first : first + columns] for first in range(0, len(pixels), columns)]
    lines = ["   ".join("".join(line) for line in lines) for row in rows for lines in row.swapaxes(0, 1)]
    return "\n".join(lines)


def save_loss_curve(losses: Sequence[float], path: Path, *, window: int = 50) -> None:
    """Writes the loss of every step, and its mean over the last `window` steps, with a logarithmic axis."""
    save_loss_curves({"": losses}, path, window=window)


def save_loss_curves(runs: dict[str, Sequence[float]], path: Path, *, window: int = 50) -> None:
    """Writes the losses of several runs, one colour each, under their names: every step pale, the mean over it."""
    figure = Figure(figsize=(7, 4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for number, (name, losses) in enumerate(runs.items()):
        prefix = f"{legible(name)}, " if name else ""
        averaged = len(losses) >= window
        axes.semilogy(
            np.arange(1, len(losses) + 1),
            losses,
            color=f"C{number}",
            alpha=0.25 if averaged else 1,
            linewidth=0.7,
            label=None if averaged and len(runs) > 1 else f"{prefix}each step",
        )
        if averaged:
            means = np.convolve(losses, np.full(window, 1 / window), mode="valid")
            steps = np.arange(window, len(losses) + 1)
            axes.semilogy(steps, means, color=f"C{number}", label=f"{prefix}mean of {window} steps")
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend()
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG, and the folders above it where there are none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=figure.dpi)
