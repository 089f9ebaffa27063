"""Training throughput of the models of one size: python -m examples.dydi_lit.throughput

A training step is the loss of a batch of latents, its gradients and a step of AdamW. All models take their steps in
turn, so that a drift of the machine meets all of them; a ratio is the median of those within a round. Weights and
latents are random. Rows of JSON; the table is printed, and printed again with --no-measure.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.harness import Row, clock, environment, read_rows, summarize, write_rows
from examples.dydi_lit.configs import TITLES, Model, Size, config_of
from examples.dydi_lit.diffusion import NUM_TIMESTEPS, GaussianDiffusion
from examples.dydi_lit.flops import PIXELS_PER_LATENT
from examples.dydi_lit.model import DiffusionTransformer

MODELS: tuple[Model, ...] = ("dit", "pixart-sigma", "edit", "dig", "lit", "moh-dit", "sana", "dydi-lit")
RIVAL: Model = "dit"
"""What ratios are taken over."""


@dataclass(frozen=True)
class ThroughputConfig:
    """Time training steps of all models of one size, in turn, in float32."""

    output: Path = Path("runs/throughput.jsonl")
    """File of the rows."""
    models: tuple[Model, ...] = MODELS
    """Which models, DiT among them."""
    size: Size = "S"
    """Their size."""
    resolution: int = 256
    """Height and width of the images in pixels, eight to a latent."""
    batch_size: int = 4
    """Latents of a step."""
    rounds: int = 10
    """Steps of each model that are timed, after one that is not."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train."""
    measure: bool = True
    """Whether to measure; else the table is that of the rows that are there."""

    def __post_init__(self) -> None:
        patch = config_of(RIVAL, self.size).patch_size * PIXELS_PER_LATENT
        if self.resolution < patch or self.resolution % patch:
            raise ValueError(f"resolution must be a multiple of {patch}; got {self.resolution}")
        for name in ("batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if RIVAL not in self.models:
            raise ValueError(f"models must hold {RIVAL}, which all are compared with; got {', '.join(self.models)}")


def step_of(model: Model, config: ThroughputConfig) -> Callable[[], None]:
    """One training step as a call."""
    settings = config_of(model, config.size)
    network = DiffusionTransformer(settings).to(config.device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    diffusion = GaussianDiffusion(config.device)
    side, count = config.resolution // PIXELS_PER_LATENT, config.batch_size
    latents, noise = torch.randn(2, count, settings.in_channels, side, side, device=config.device)
    timesteps = torch.randint(NUM_TIMESTEPS, (count,), device=config.device)
    labels = torch.randint(settings.num_classes, (count,), device=config.device)
    noisy = diffusion.add_noise(latents, noise, timesteps)

    def step() -> None:
        output = network(noisy, timesteps, labels)
        loss = diffusion.losses(output, latents, noisy, noise, timesteps).total.mean() + network.balance()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def rows(config: ThroughputConfig) -> list[Row]:
    """A row for each model."""
    clocks = {model: clock(step_of(model, config), config.device) for model in config.models}
    taken: dict[Model, list[float]] = {model: [] for model in config.models}
    for _ in tqdm(range(config.rounds + 1), unit="round"):
        for model, seconds in clocks.items():
            taken[model].append(seconds())
    facts = {"size": config.size, "resolution": config.resolution, "batch": config.batch_size, "dtype": "float32"}
    found = []
    for model in config.models:
        ratios = [theirs / ours for theirs, ours in zip(taken[RIVAL][1:], taken[model][1:], strict=True)]
        measured = summarize(taken[model][1:])
        images = 1e3 * config.batch_size / measured["median_ms"]
        speed = {"images_per_second": images, "over_dit": statistics.median(ratios)}
        spread = {"over_dit_least": min(ratios), "over_dit_most": max(ratios)}
        found.append({"model": model, **speed, **spread, **measured, **facts, **environment(config.device)})
    return found


def table(measured: list[Row]) -> str:
    """In Markdown, the fastest first."""
    lines = [
        [
            TITLES[row["model"]], f"{row['images_per_second']:.2f}",
            f"{row['over_dit']:.2f} ({row['over_dit_least']:.2f}-{row['over_dit_most']:.2f})",
        ]
        for row in sorted(measured, key=lambda row: -row["over_dit"])
    ]  # fmt: skip
    return tabulate(lines, ["model", "images/s", "speed over DiT (range)"], "github", disable_numparse=True)


def main() -> None:
    try:
        config = tyro.cli(ThroughputConfig, prog="python -m examples.dydi_lit.throughput")
        if config.measure:
            write_rows(config.output, rows(config))
        measured = read_rows(config.output)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(
        "Training steps, size {size}, {resolution} pixels, batch {batch}, {dtype}, {device}, threads: {threads}, "
        "torch {torch}, commit {commit}".format(**measured[0])
    )
    print(table(measured))


if __name__ == "__main__":
    main()
