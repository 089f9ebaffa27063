"""Draws digits from a trained DyDi-LiT: python -m examples.dydi_lit.sample CHECKPOINT"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor
from tqdm import tqdm

from examples.dydi_lit.checkpoint import load_ema_model, plain_errors
from examples.dydi_lit.data import IMAGE_SIZE, NUM_CLASSES
from examples.dydi_lit.figures import save_grid
from examples.dydi_lit.model import DyDiLiT
from examples.dydi_lit.train import NOISE_SCHEDULE


@dataclass(frozen=True)
class SampleConfig:
    """Draw digits from a trained DyDi-LiT and write them as one PNG, a class to a row."""

    checkpoint: tyro.conf.Positional[Path]
    """Folder written by training."""
    output: Path = Path("runs/samples.png")
    """PNG file to write."""
    per_class: int = 10
    """Digits of each class."""
    guidance: float = 1.5
    """Scale of classifier-free guidance; 1 is none."""
    steps: int = 30
    """Steps of the DDIM sampler."""
    seed: int = 0
    """Seed of the noise that sampling starts from."""


@torch.inference_mode()
def sample(
    model: DyDiLiT,
    labels: Tensor,
    *,
    guidance: float = SampleConfig.guidance,
    steps: int = SampleConfig.steps,
    seed: int = SampleConfig.seed,
) -> Tensor:
    """Draws one image for each label, with DDIM: (n,) int64 -> (n, C, 8, 8) float32 in -1..1.

    The noise estimate is eps(null) + guidance (eps(label) - eps(null)), both halves in one pass. The starting noise is
    drawn on the CPU: a seed names the same noise on every device.
    """
    device = next(model.parameters()).device
    scheduler = DDIMScheduler(**NOISE_SCHEDULE, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    shape = (len(labels), model.config.in_channels, IMAGE_SIZE, IMAGE_SIZE)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    labels = labels.to(device)
    both_labels = torch.cat([labels, torch.full_like(labels, model.null_class)])

    for timestep in tqdm(scheduler.timesteps, unit="step", desc=f"sample, guidance {guidance:g}"):
        if guidance == 1:
            noise = model(images, timestep.to(device).expand(len(labels)), labels)
        else:
            timesteps = timestep.to(device).expand(len(both_labels))
            given, null = model(torch.cat([images, images]), timesteps, both_labels).chunk(2)
            noise = null + guidance * (given - null)
        # The scheduler clips its estimate of the clean image to -1..1; the noise must follow, or the two disagree
        # and the error grows from step to step.
        images = scheduler.step(noise, timestep, images, use_clipped_model_output=True).prev_sample
    return images.clamp(-1, 1)


def labels_of(per_class: int) -> Tensor:
    """(10 * per_class,) int64: `per_class` zeros, as many ones, and so on."""
    return torch.arange(NUM_CLASSES).repeat_interleave(per_class)


def draw_grid(config: SampleConfig) -> Tensor:
    """Writes `config.output` and returns the images in it; CheckpointError where there is no checkpoint."""
    model, labels = load_ema_model(config.checkpoint), labels_of(config.per_class)
    images = sample(model, labels, guidance=config.guidance, steps=config.steps, seed=config.seed)
    save_grid(images, config.output, columns=config.per_class)
    return images


def main() -> None:
    config = tyro.cli(SampleConfig, prog="python -m examples.dydi_lit.sample")
    with plain_errors():
        draw_grid(config)
    print(f"wrote {config.output}")


if __name__ == "__main__":
    main()
