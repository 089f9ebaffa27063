"""Table 4's ladder at toy size, on a CPU: python -m examples.dydi_lit.ladder

Every model is trained with several seeds. A seed fixes the order of the data, the noise, and the initial weights of
all that two models have in common, so that differences are taken between runs of one seed. Beside the ladder stand
DiT, the map-wise differential (Table 5), the increasing initial lambda (Table 6), and a control: the rows before
the token differential have a denominator (Eq. 4) and Eq. 8 has none, so the control keeps the denominator.

The measure is the held-out error: the mean squared error of the noise that the averaged model predicts in the images
it never saw, over evenly spaced time steps, with the same noise for every run. Images are digits, in which neighbours
say most, or `--data twins`, in which they say nothing (:mod:`examples.dydi_lit.twins`); for these the error is given
between the two that frame it, too.
"""

import csv
import multiprocessing
import statistics
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from examples.dydi_lit.checkpoint import load_ema_model, plain_errors, read_losses
from examples.dydi_lit.configs import LADDER, TITLES, Model, Size
from examples.dydi_lit.data import digits
from examples.dydi_lit.diffusion import GaussianDiffusion, alpha_bars
from examples.dydi_lit.model import DiffusionTransformer
from examples.dydi_lit.plots import DPI, save
from examples.dydi_lit.train import TrainConfig, train
from examples.dydi_lit.twins import HELD_OUT, bounds, twins

COMPARED_WITH: dict[Model, Model] = {
    **dict(zip(LADDER[1:], LADDER, strict=False)),
    **dict.fromkeys(("dit", "pixart-sigma", "edit", "dig", "lit", "moh-dit"), "sana"),
    "token-differential-denominator": "dynamic-projection",
    "map-differential": "token-differential",
    "increasing-lambda": "token-differential",
}
"""What each row is compared with: on the ladder the row before, else the row it varies."""

_HELD_OUT_TIMES = range(25, 1000, 50)  # the middles of 20 equal parts


@dataclass(frozen=True)
class LadderConfig:
    """Train the rows of Table 4 on digits with paired seeds, and print a table with mean and spread."""

    output: Path = Path("runs/ladder")
    """Folder that receives ladder.csv, ladder.png and, for each run, a folder with its checkpoint."""
    models: tuple[Model, ...] = (
        *LADDER,
        "token-differential-denominator",
        "map-differential",
        "increasing-lambda",
        "dit",
    )
    """Rows to train."""
    seeds: int = 3
    """Seeds per row: 0, 1, and so on."""
    data: Literal["digits", "twins"] = "digits"
    """Images."""
    size: Size = "toy"
    """Size of the models."""
    steps: int = 500
    """Training steps of a run."""
    workers: int = 2
    """Runs at a time, each on one thread. A run that ladder.csv holds already is not repeated."""


@dataclass(frozen=True)
class Run:
    """One row of ladder.csv."""

    model: Model
    seed: int
    data: str
    size: Size
    steps: int
    held_out: float
    """Mean squared error of the noise on held-out images, averaged weights."""
    training: float
    """Mean of the training loss over the last 100 steps."""
    seconds: float
    """Of training, on one thread, whatever else ran beside it."""
    torch: str
    """Version."""


def run(model: Model, seed: int, config: LadderConfig) -> Run:
    """Trains one model from one seed and measures it."""
    started = time.perf_counter()
    checkpoint = train(
        TrainConfig(
            model=model,
            size=config.size,
            data=config.data,
            output=config.output / f"{model}-{seed}",
            steps=config.steps,
            learning_rate=2e-3,
            ema_decay=0.99,
            learn_sigma=False,
            save_every=config.steps,
            progress=False,  # one bar for all runs is enough
            seed=seed,
        )
    )
    seconds = time.perf_counter() - started
    training = statistics.fmean(read_losses(checkpoint)[-100:])
    error = held_out_error(load_ema_model(checkpoint), held_out(config.data))
    return Run(
        model, seed, config.data, config.size, config.steps, error, training, round(seconds, 1), torch.__version__
    )


class HeldOut(NamedTuple):
    """Images (n, C, h, w) float32 and labels (n,) that no run trains on; of twins also where each tile's twin is."""

    images: Tensor
    labels: Tensor
    partners: Tensor | None = None


def held_out(data: Literal["digits", "twins"]) -> HeldOut:
    if data == "digits":
        return HeldOut(*digits("held-out").tensors)
    images, partners = twins(HELD_OUT, 1)
    return HeldOut(images.float(), torch.zeros(len(images), dtype=torch.int64), partners)


def noised(images: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The time steps, the noise at each, and the images with it; the same for every run."""
    diffusion, generator = GaussianDiffusion(), torch.Generator().manual_seed(0)
    for step in _HELD_OUT_TIMES:
        noise = torch.randn(images.shape, generator=generator)
        yield step, noise, diffusion.add_noise(images, noise, torch.full((len(images),), step))


@torch.inference_mode()
def held_out_error(model: DiffusionTransformer, held_out: HeldOut) -> float:
    """Mean squared error of the noise predicted in the held-out images, which is 1 for a prediction of zero."""
    errors = []
    for step, noise, noisy in noised(held_out.images):
        predicted = model(noisy, torch.full_like(held_out.labels, step), held_out.labels)
        errors.append((predicted[:, : noise.shape[1]] - noise).square().mean().item())
    return statistics.fmean(errors)


def frame(held_out: HeldOut) -> tuple[float, float]:
    """The errors of the best denoiser of single pixels, and of the best that knows every tile's twin."""
    assert held_out.partners is not None
    levels = alpha_bars()
    found = [
        bounds(noisy, noise, held_out.partners, float(levels[step])) for step, noise, noisy in noised(held_out.images)
    ]
    alone, paired = zip(*found, strict=True)
    return statistics.fmean(alone), statistics.fmean(paired)


def read_runs(path: Path) -> list[Run]:
    """The rows of ladder.csv; none where there is no such file."""
    if not path.exists():
        return []
    numbers: dict[str, Any] = {field.name: field.type for field in fields(Run) if field.type in (int, float)}
    with path.open(newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    return [Run(**(row | {name: kind(row[name]) for name, kind in numbers.items()})) for row in rows]


def append_run(path: Path, row: Run) -> None:
    """Adds a row to ladder.csv."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Run)], lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(vars(row))


def table(runs: Iterable[Run]) -> str:
    """The runs as a table in Markdown: means and standard deviations over the seeds, in thousandths."""
    errors: dict[Model, dict[int, float]] = {}
    for row in runs:
        errors.setdefault(row.model, {})[row.seed] = row.held_out * 1000
    lines = ["| model | seeds | held-out error, 1/1000 | compared with | difference | of one sign |"]
    lines.append("|---|---|---|---|---|---|")
    for model in (name for name in TITLES if name in errors):
        found = errors[model]
        cells = [_title(model), str(len(found)), spread(list(found.values())), "", "", ""]
        other = COMPARED_WITH.get(model)
        common = sorted(found.keys() & errors.get(other, {}).keys()) if other else []
        if other and common:
            differences = [found[seed] - errors[other][seed] for seed in common]
            ups = sum(difference > 0 for difference in differences)
            cells[3:] = [
                TITLES[other],
                spread(differences, signed=True),
                f"{max(ups, len(common) - ups)}/{len(common)}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(runs: Iterable[Run]) -> Figure:
    """Each model a line, best read beside the table: a dot for each seed, the mean, and the standard deviation."""
    errors: dict[Model, list[float]] = {}
    for row in runs:
        errors.setdefault(row.model, []).append(row.held_out * 1000)
    models = [name for name in TITLES if name in errors]
    figure = Figure(figsize=(9, 1.1 + 0.32 * len(models)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for line, model in enumerate(models):
        found = errors[model]
        axes.plot(found, [line] * len(found), "o", color="C0", markersize=4, alpha=0.5)
        deviation = statistics.stdev(found) if len(found) > 1 else 0
        axes.errorbar(statistics.fmean(found), line, xerr=deviation, fmt="|", color="C3", markersize=12, capsize=3)
    axes.set_yticks(range(len(models)), [_title(model) for model in models])
    axes.invert_yaxis()
    axes.set(xlabel="held-out error, 1/1000")
    figure.suptitle("each seed, mean and standard deviation", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    return figure


def _title(model: Model) -> str:
    return "+ reparameterization (DyDi-LiT)" if model == "dydi-lit" else TITLES[model]


def spread(values: list[float], *, signed: bool = False) -> str:
    """Mean and sample standard deviation."""
    mean = f"{statistics.fmean(values):{'+' if signed else ''}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def ladder(config: LadderConfig) -> list[Run]:
    """All the runs that `config` asks for, those of ladder.csv included."""
    path = config.output / "ladder.csv"
    wanted_kind = (config.data, config.size, config.steps)
    runs = [row for row in read_runs(path) if (row.data, row.size, row.steps) == wanted_kind]
    done = {(row.model, row.seed) for row in runs}
    wanted = [(model, seed) for seed in range(config.seeds) for model in config.models]
    # Spawned: processes forked from one that has run torch can hang in its thread pool.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pending = [pool.submit(run, *pair, config) for pair in wanted if pair not in done]
        for future in tqdm(as_completed(pending), total=len(pending), unit="run", desc="ladder"):
            append_run(path, future.result())
            runs.append(future.result())
    return [row for row in runs if (row.model, row.seed) in wanted]


def main() -> None:
    config = tyro.cli(LadderConfig, prog="python -m examples.dydi_lit.ladder")
    with plain_errors():
        rows = ladder(config)
    print(table(rows))
    if config.data == "twins":
        alone, paired = frame(held_out("twins"))
        print(f"pixels alone: {alone * 1000:.1f}; every twin known: {paired * 1000:.1f}")
    save(picture(rows), config.output / "ladder.png")
    print(f"wrote {config.output / 'ladder.csv'} and ladder.png")


if __name__ == "__main__":
    main()
