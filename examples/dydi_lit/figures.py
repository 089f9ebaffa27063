"""Draws the paper's figures of a trained model: python -m examples.dydi_lit.figures CHECKPOINT

    loss.png      the training loss
    routing.png   Fig. 5: which projectors the tokens of each class take in each block, counted while sampling
    maps.png      Fig. 6: the attention of one token as the components are added
    lambda.png    Fig. 7: the differential factor against depth

The paper does not say whether each map of its Fig. 6 is of a model trained with those components only. Here all maps
are stages of one layer of one trained model, and their formulas stand above them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from tqdm import tqdm

from dydila_kernels import DyDiLAttention
from examples.dydi_lit.checkpoint import load_ema_model, plain_errors, read_losses, read_training
from examples.dydi_lit.configs import TITLES
from examples.dydi_lit.data import DataError
from examples.dydi_lit.diffusion import sample, seeds_of
from examples.dydi_lit.drawing import decode
from examples.dydi_lit.extract_latents import load_vae
from examples.dydi_lit.inspection import AttentionMap, Lambdas, Usage, attention_maps, lambdas_of, watching
from examples.dydi_lit.plots import DPI, legible, save, save_loss_curves
from examples.dydi_lit.sample import classes_to_show


@dataclass(frozen=True)
class FiguresConfig:
    """Draw losses, routing, attention maps and differential factors of a trained model, each as a PNG."""

    checkpoint: tyro.conf.Positional[Path]
    """Folder written by training."""
    output: Path = Path("runs/figures")
    """Folder that receives the PNG files."""
    compare: tuple[Path, ...] = ()
    """Checkpoints whose losses and differential factors are drawn beside, such as the map-wise model's."""
    classes: tuple[int, ...] = ()
    """Labels to draw, from 0; unless given, all where there are at most ten, and else eight of them."""
    per_class: int = 4
    """Images of each class whose tokens are counted."""
    steps: int = 30
    """Steps of the DDIM sampler; routing is counted over all of them."""
    guidance: float = 1.5
    """Scale of classifier-free guidance; 1 is none. Only tokens of the given class are counted."""
    seed: int = 0
    """Seed of the noise."""
    block: int | None = None
    """Block of the attention maps, from 0; unless given, the one in the middle."""
    query: tuple[int, int] | None = None
    """Row and column of the token that attends in the attention maps, from 0; unless given, the centre."""
    timestep: int = 0
    """The maps are of the sampling step nearest to this one of 0..999; 0 is the last, with the least noise."""
    vae: str | None = None
    """AutoencoderKL that decodes latents, a local folder or a name on the Hugging Face hub; the one that encoded the
    training data unless given. Pixels need none."""

    def __post_init__(self) -> None:
        if self.per_class < 1:
            raise ValueError(f"per_class must be at least 1; got {self.per_class}")


@dataclass
class Study:
    """What was seen of one model while it drew."""

    title: str
    data: dict[str, Any]
    classes: tuple[int, ...]
    usage: Usage
    lambdas: list[Lambdas]
    losses: list[float]
    drawn: Tensor
    """The first image (1, C, size, size) as the network draws it."""
    maps: list[AttentionMap]
    block: int
    query: tuple[int, int]
    grid: tuple[int, int]
    """Rows and columns of tokens."""
    timestep: int


def study(folder: Path, config: FiguresConfig) -> Study:
    """Draws images with the model in `folder` and watches it.

    Raises CheckpointError where there is none, and ValueError for a class, block or token that it does not have.
    """
    training, model = read_training(folder), load_ema_model(folder)
    data, names = training["data"], training["data"]["class_names"]
    title = f"{TITLES[training['train']['model']]}, {training['train']['size']}"
    classes = config.classes or classes_to_show(len(names))
    depth, side = model.config.depth, data["size"] // model.config.patch_size
    block = depth // 2 if config.block is None else config.block
    query = (side // 2, side // 2) if config.query is None else config.query
    if not all(0 <= number < len(names) for number in classes):
        raise ValueError(f"classes must be in 0..{len(names) - 1}; got {classes}")
    if not 0 <= block < depth:
        raise ValueError(f"block must be in 0..{depth - 1}; got {block}")
    if not all(0 <= place < side for place in query):
        raise ValueError(f"query must be a row and a column in 0..{side - 1}; got {query}")

    usage = Usage()
    nearest: tuple[int, Tensor] | None = None  # time step and tokens of the first image

    def see(number: int, layer: nn.Module, x: Tensor, timesteps: Tensor, labels: Tensor) -> None:
        nonlocal nearest
        if isinstance(layer, DyDiLAttention):
            usage.add(number, layer, x, labels, len(names))
        if number == block and labels[0] == classes[0]:
            seen = int(timesteps[0]), x[0].clone()
            nearest = min(nearest or seen, seen, key=lambda moment: abs(moment[0] - config.timestep))

    seeds, drawn = seeds_of(config.seed, range(config.per_class)), []
    with watching(model, see):
        for label in tqdm(classes, unit="class", desc=title):
            images = sample(
                model,
                torch.full((config.per_class,), label),
                size=data["size"],
                seeds=seeds,
                sampler="ddim",
                steps=config.steps,
                guidance=config.guidance,
                clip=data["kind"] != "latents",
                progress=False,
            )
            drawn.append(images[:1])
    assert nearest is not None
    layer = model.blocks[block].attention
    assert isinstance(layer, nn.Module)
    return Study(
        title=title,
        data=data,
        classes=classes,
        usage=usage,
        lambdas=lambdas_of(model, usage, classes),
        losses=read_losses(folder),
        drawn=drawn[0],
        maps=attention_maps(layer, nearest[1], query[0] * side + query[1]),
        block=block,
        query=query,
        grid=(side, side),
        timestep=nearest[0],
    )


def routing_figure(seen: Study) -> Figure:
    """Fig. 5 for Q' (above) and K': the most frequent projector of each class and block, and every one's share."""
    names = [legible(seen.data["class_names"][number]) for number in seen.classes]
    shares = {side: seen.usage.shares(f"projection_{side}", seen.classes).numpy() for side in "qk"}
    blocks, _, projectors = shares["q"].shape
    width = (0.28 * blocks + 0.15) * (projectors + 1) + 0.07 * max(map(len, names)) + 1.7
    figure = Figure(figsize=(width, 2 * (0.22 * len(names) + 0.75)), dpi=DPI, layout="constrained")
    grid = figure.subplots(2, projectors + 1, sharex=True, sharey=True, squeeze=False)
    colours = colormaps["Set2"](range(8)) if projectors <= 8 else colormaps["turbo"](np.linspace(0, 1, projectors))
    palette = ListedColormap(colours[:projectors])
    bounds = BoundaryNorm(np.arange(projectors + 1) + 0.5, projectors)
    largest = max(share.max() for share in shares.values())
    for row, side in zip(grid, "qk", strict=True):
        share = shares[side].transpose(2, 1, 0)  # (projectors, classes, blocks)
        chosen = row[0].imshow(share.argmax(0) + 1, cmap=palette, norm=bounds, aspect="auto")
        row[0].set_title("most frequent", fontsize=9)
        row[0].set_yticks(range(len(names)), names)
        row[0].set_ylabel(f"{side.upper()}'", fontsize=12, rotation=0, labelpad=12)
        for projector, axes in enumerate(row[1:]):
            shaded = axes.imshow(share[projector], cmap="viridis", vmin=0, vmax=largest, aspect="auto")
            axes.set_title(f"% to projector {projector + 1}", fontsize=9)
            for (class_, block), value in np.ndenumerate(share[projector] * 100):
                colour = "black" if value > 60 * largest else "white"
                axes.text(block, class_, f"{value:.0f}", ha="center", va="center", fontsize=6, color=colour)
    for axes in grid.flat:
        axes.set_xticks(range(blocks))
        axes.tick_params(labelsize=8, length=2)
    for axes in grid[1]:
        axes.set_xlabel("block", fontsize=8)
    bars = (
        figure.colorbar(chosen, ax=grid[0, :], ticks=range(1, projectors + 1), label="projector", aspect=14, pad=0.02),
        figure.colorbar(shaded, ax=grid[1, :], label="share of the tokens", aspect=14, pad=0.02),
    )
    for bar in bars:
        bar.ax.tick_params(labelsize=8)
        bar.ax.yaxis.label.set_fontsize(8)
    figure.suptitle(f"Routing of the dynamic projection: {legible(seen.title)}", fontsize=10)
    return figure


def maps_figure(seen: Study, image: Tensor | None) -> Figure:
    """Fig. 6: the image (1 or 3, height, width) in -1..1 unless None, then one map each; a red box is the query."""
    panels = len(seen.maps) + (image is not None)
    figure = Figure(figsize=(2.3 * panels + 0.2, 4), dpi=DPI, layout="constrained")
    grid = figure.subplots(2, panels, height_ratios=(16, 1), squeeze=False)
    if image is not None:
        grid[1, 0].axis("off")
        extent = (-0.5, seen.grid[1] - 0.5, seen.grid[0] - 0.5, -0.5)  # so that a token is one unit wide
        pixels = ((image.float().clamp(-1, 1) + 1) / 2).permute(1, 2, 0).cpu().numpy()
        grid[0, 0].imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=extent)
        grid[0, 0].set_title(f"image\nof class {legible(seen.data['class_names'][seen.classes[0]])}", fontsize=8)
        _box(grid[0, 0], seen.query)
    for (axes, scale), shown in zip(grid[:, panels - len(seen.maps) :].T, seen.maps, strict=True):
        weights = shown.weights.view(seen.grid).numpy() * 100
        largest = np.abs(weights).max()
        signed = weights.min() < 0
        low, colours = (-largest, "RdBu_r") if signed else (0, "turbo")
        drawn = axes.imshow(weights, cmap=colours, vmin=low, vmax=largest)
        bar = figure.colorbar(drawn, cax=scale, orientation="horizontal")
        bar.set_label("% of all |weights|" + (", negative blue" if signed else ""), fontsize=7)
        scale.tick_params(labelsize=7)
        axes.set_title(f"{shown.title}\n{shown.formula}", fontsize=8)
        evenness = f"entropy: {shown.entropy:.0%} of an even map's\nlargest tenth: {shown.largest_tenth:.0%} of all"
        axes.set_xlabel(evenness, fontsize=7)
        _box(axes, seen.query)
    place = f"block {seen.block}, time step {seen.timestep}, query token {seen.query}"
    figure.suptitle(f"Attention maps within one model: {legible(seen.title)}\n{place}", fontsize=9)
    return figure


def _box(axes: Axes, query: tuple[int, int]) -> None:
    """A red box with a white rim around the query token, and no ticks."""
    corner = (query[1] - 0.5, query[0] - 0.5)
    for colour, width in (("white", 4), ("red", 2)):
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=colour, linewidth=width, clip_on=False))
    axes.set(xticks=[], yticks=[])


def lambda_figure(studies: list[Study]) -> Figure:
    """Fig. 7: the mean differential factor of each block, its range, and the mean weighted by use."""
    figure = Figure(figsize=(6, 4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for number, seen in enumerate(studies):
        blocks, colour = range(len(seen.lambdas)), f"C{number}"
        least, greatest = ([getattr(lam, name) for lam in seen.lambdas] for name in ("least", "greatest"))
        axes.fill_between(blocks, least, greatest, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            blocks,
            [lam.mean for lam in seen.lambdas],
            color=colour,
            marker="o",
            markersize=4,
            label=legible(seen.title),
        )
        axes.plot(blocks, [lam.used for lam in seen.lambdas], color=colour, linestyle=":")
    axes.plot([], [], color="0.4", marker="o", markersize=4, label="mean of the table (band: its range)")
    axes.plot([], [], color="0.4", linestyle=":", label="mean over the tokens")
    axes.set(xlabel="block", ylabel="differential factor λ", title="Differential factors")
    axes.set_xticks(range(max(len(seen.lambdas) for seen in studies)))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def picture(seen: Study, name: str | None) -> Tensor | None:
    """The drawn image (1 or 3, height, width) in -1..1; None for latents without a VAE, unless one was named."""
    if seen.data["kind"] != "latents":
        return seen.drawn[0]
    try:
        vae: Any = load_vae(name or seen.data["vae"])
    except DataError as error:
        if name is not None:
            raise
        print(f"left out: the image beside the attention maps ({error})")
        return None
    with torch.inference_mode():
        return decode(vae.to(seen.drawn.device), seen.drawn, seen.data["scaling_factor"])[0]


def draw(config: FiguresConfig) -> list[Path]:
    """Draws what the model has and prints what was left out; returns the files. Raises as `study` and `picture` do."""
    studies = [study(folder, config) for folder in (config.checkpoint, *config.compare)]
    titles = [seen.title for seen in studies]
    for seen, folder in zip(studies, (config.checkpoint, *config.compare), strict=True):
        if titles.count(seen.title) > 1:
            seen.title += f" ({folder})"
    first, files = studies[0], [config.output / "loss.png"]
    save_loss_curves({seen.title: seen.losses for seen in studies}, files[0])
    if first.maps:
        files.append(config.output / "maps.png")
        save(maps_figure(first, picture(first, config.vae)), files[-1])
    else:
        print(f"left out: maps.png ({first.title} has no weight for each token in block {first.block})")
    if "projection_q" in first.usage.counts:
        files.append(config.output / "routing.png")
        save(routing_figure(first), files[-1])
    else:
        print(f"left out: routing.png ({first.title} has no dynamic projection)")
    if with_factors := [seen for seen in studies if seen.lambdas]:
        files.append(config.output / "lambda.png")
        save(lambda_figure(with_factors), files[-1])
    if without := [seen.title for seen in studies if not seen.lambdas]:
        print(f"left out of lambda.png: {', '.join(without)} (no differential factors)")
    return files


def main() -> None:
    with plain_errors(ValueError):
        config = tyro.cli(FiguresConfig, prog="python -m examples.dydi_lit.figures")
        files = draw(config)
    print(f"wrote {', '.join(map(str, files))}")


if __name__ == "__main__":
    main()
