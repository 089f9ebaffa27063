"""Short training runs of DyDi-LiT on either backend, Sana and DiT: ``python -m benchmarks.training``.

Do the Triton kernels train as the torch backend does?  All runs of a seed meet the same batches and noise, and those of
one model start from the same weights; the losses of two backends are to differ by no more than those of two seeds do.
The images are scikit-learn's digits, enlarged to latents of four channels.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from benchmarks import harness, suite
from benchmarks.harness import Row
from benchmarks.model import DiffusionTransformer, configs
from dydila_kernels import DyDiLAttention, tuning
from examples.dydi_lit.data import digits
from examples.dydi_lit.diffusion import GaussianDiffusion

WARM_UP = 3  # steps left out of the time: they compile kernels and fill caches
LAST = 0.25  # the fraction of the steps, from the end, whose mean loss is compared
WRONG = "wrong: the loss differs from that on the torch backend by more than that of two seeds"
# Models of the example, and the backends of their layers.
RUNS = (("dydi-lit", "triton"), ("dydi-lit", "torch"), ("sana", None), ("dit", None))


@dataclass(frozen=True)
class Config(harness.Options):
    """Train DyDi-LiT with the Triton kernels and with the torch backend, Sana and DiT, from the same seeds.

    On a CPU the kernels take no part: a step in the interpreter is a minute."""

    models: tuple[Literal["tiny", "S", "B", "L"], ...] = ("tiny", "S")  # Sizes of the models.
    side: int = 32  # Of the latents: 32 stands for images of 256 pixels, which have 256 tokens.
    batch: int = 128  # Images of a step.
    steps: int = 300  # Optimiser steps of each run.
    seeds: tuple[int, ...] = (0, 1)  # Seeds of weights, batches and noise, two at least.


def main(config: Config) -> list[Row]:
    """Trains, prints a table, stores a row for each run and returns them."""
    if len(set(config.seeds)) < 2:
        raise ValueError(f"seeds must be two different ones at least; got {config.seeds}")
    torch.set_num_threads(config.threads)
    dtype = torch.bfloat16 if config.on_gpu else torch.float32
    found = runs(smoke(config) if config.smoke else config)
    rows = harness.stored("training", found, config.device, dtype, config.out)
    print(table(rows))
    return rows


def smoke(config: Config) -> Config:
    return replace(config, models=("tiny",), side=8, batch=2, steps=WARM_UP + 1)


def runs(config: Config) -> Iterator[Row]:
    """A row for each size, seed, model and backend; those of a size are compared, and told, as they come."""
    for size in config.models:
        rows: list[Row] = []
        for seed, (name, backend) in product(config.seeds, RUNS):
            without = backend == "triton" and not config.on_gpu
            found = {"skipped": "the kernels need a GPU"} if without else train(config, size, seed, name, backend)
            facts = {"name": name, "backend": backend, "size": size, "seed": seed, "batch": config.batch}
            rows.append({**facts, "mode": "training", "tokens": (config.side // 2) ** 2, "skipped": None, **found})
            compare(rows)
            yield rows[-1]


def train(config: Config, size: Any, seed: int, name: Any, backend: str | None) -> Row:
    """A run: ``losses`` of all steps, ``median_ms`` of a step with its optimiser, and ``peak_mib`` of the whole run."""
    device = torch.device(config.device)
    torch.manual_seed(seed)
    model = DiffusionTransformer(configs.config_of(name, size, num_classes=10)).to(device)
    for module in model.modules():
        if isinstance(module, DyDiLAttention) and backend is not None:
            module.backend = backend
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    diffusion, (images, labels) = GaussianDiffusion(device), latents(config.side)
    losses: list[float] = []
    seconds: list[float] = []

    def step(number: int) -> None:
        generator = torch.Generator().manual_seed(1_000_000 * seed + number)
        chosen = torch.randint(len(images), (config.batch,), generator=generator)
        timestep = torch.randint(diffusion.num_timesteps, (config.batch,), generator=generator).to(device)
        image, label = images[chosen].to(device), labels[chosen].to(device)
        noise = torch.randn(image.shape, generator=generator).to(device)
        noisy = diffusion.add_noise(image, noise, timestep)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = model(noisy, timestep, label)
        loss = diffusion.losses(output, image, noisy, noise, timestep).total.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # which waits for the device

    def run() -> None:
        seconds.extend(tuning.seconds_of(partial(step, number), device) for number in range(config.steps))

    peak = harness.peak_growth_mib(run, config.device)
    # On a CPU, runs share a process, and memory that one gave back hides what the next one takes.
    measured = {"median_ms": 1e3 * statistics.median(seconds[WARM_UP:]), "peak_mib": peak if config.on_gpu else None}
    return {"steps": config.steps, **measured, "losses": losses}


def latents(side: int) -> tuple[Tensor, Tensor]:
    """Images (n, 4, side, side) of about unit variance, and labels (n,)."""
    images, labels = digits("train").tensors
    images = F.interpolate((images - images.mean()) / images.std(), size=(side, side), mode="bilinear")
    return torch.cat([images, -images, images.mT, images.flip(-1)], 1), labels


def last_loss(row: Row) -> float:
    return statistics.fmean(row["losses"][-max(round(LAST * len(row["losses"])), 1) :])


def compare(rows: Sequence[Row]) -> None:
    """Adds to the rows of the Triton kernels how far their last losses are from the torch backend's, and what may be.

    ``difference`` is the mean over the seeds, ``spread`` the largest difference of two seeds on the torch backend.
    """
    done = [row for row in rows if not row["skipped"]]
    ours, of_torch = ({row["seed"]: row for row in done if row["backend"] == name} for name in ("triton", "torch"))
    seeds = ours.keys() & of_torch.keys()
    if len(seeds) < 2:
        return
    expected = {seed: last_loss(of_torch[seed]) for seed in seeds}
    difference = statistics.fmean(abs(last_loss(ours[seed]) - loss) for seed, loss in expected.items())
    spread = max(expected.values()) - min(expected.values())
    for seed in seeds:
        ours[seed] |= {"difference": difference, "spread": spread}
        if not difference <= spread:  # written so that NaN fails
            ours[seed]["skipped"] = WRONG


def table(rows: Sequence[Row]) -> str:
    """A line for each run, and how far backends and seeds are apart: times in ms, memory in MiB."""
    shown = ("size", "seed", "name", "backend", "last_loss", "difference", "spread", "median_ms", "peak_mib", "skipped")
    lines = [{**row, "last_loss": last_loss(row) if "losses" in row else None} for row in rows]
    return tabulate([map(line.get, shown) for line in lines], shown, "plain", floatfmt=".4g", missingval="-")


if __name__ == "__main__":
    suite.command(main, Config)
