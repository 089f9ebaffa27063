"""Gaussian diffusion as in DiT: the noise that training adds, its loss, and the way back from noise to images.

Written from arXiv 2006.11239 (DDPM), 2102.09672 (learned variance, respaced sampling) and 2010.02502 (DDIM), with the
choices of DiT (arXiv 2212.09748). Time steps count from 0, as in DiT: x_t has alpha_bar[t], and x_0 has been noised
once. DDPM and DDIM have their own few lines rather than diffusers' schedulers. Those keep the schedule in float32,
where 1 - alpha_bar[t] loses three digits at small t, and their DDIM goes to the level of t - 1000 // steps, which is
not the next of its time steps unless `steps` divides 1000. DPM-Solver++ (arXiv 2211.01095) is that of diffusers.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.special import log_ndtr
from tqdm import tqdm

from examples.dydi_lit.model import DiffusionTransformer

NOISE_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 2e-2,
}
"""The betas, in diffusers' words: 1000 of them, evenly from 1e-4 to 2e-2."""
NUM_TIMESTEPS: int = NOISE_SCHEDULE["num_train_timesteps"]

Sampler = Literal["ddpm", "ddim", "dpm-solver++"]
GuidedChannels = Literal["all", "three"]


class Losses(NamedTuple):
    """The loss of each image, (B,) float32 each."""

    total: Tensor
    """mse + variational: L_hybrid of arXiv 2102.09672, Eq. 16."""
    mse: Tensor
    """Mean squared error of the noise."""
    variational: Tensor
    """The bound's term of the image's time step, in bits per dimension; zero without a learned variance."""


class GaussianDiffusion:
    """Noises images and computes the loss of a denoiser. The tables are made in float64 and used in float32."""

    num_timesteps = NUM_TIMESTEPS

    def __init__(self, device: torch.device | str = "cpu") -> None:
        alpha_bar = alpha_bars()
        before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        beta = 1 - alpha_bar / before
        posterior_variance = beta * (1 - before) / (1 - alpha_bar)
        posterior_variance[0] = posterior_variance[1]  # it is 0 at t = 0, and has no logarithm there

        self._signal = alpha_bar.sqrt().to(device, torch.float32)
        self._noise = (1 - alpha_bar).sqrt().to(device, torch.float32)
        self._posterior_weight = (before.sqrt() * beta / (1 - alpha_bar)).to(device, torch.float32)
        self._log_beta = beta.log().to(device, torch.float32)
        self._log_posterior_variance = posterior_variance.log().to(device, torch.float32)

    def add_noise(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t (DDPM, Eq. 4) of images and normal noise, both (B, C, h, w), at timesteps (B,) int64 in 0..999."""
        return _of(self._signal, timesteps) * images + _of(self._noise, timesteps) * noise

    def losses(self, output: Tensor, images: Tensor, noisy: Tensor, noise: Tensor, timesteps: Tensor) -> Losses:
        """The hybrid loss of a network's output (B, C or 2C, h, w) for x_t = `noisy` (B, C, h, w).

        C channels are the noise; C more are v, which puts the log variance between that of the true posterior (-1)
        and log beta (1). The variational term trains v only: the mean is detached. It is not scaled, as in DiT: the
        0.001 of arXiv 2102.09672 weighs a sum over 1000 time steps, of which this is one. Any other number of channels
        is a ValueError.
        """
        channels = images.shape[1]
        if output.shape[1] not in (channels, 2 * channels):
            raise ValueError(f"output must have {channels} or {2 * channels} channels; got {output.shape[1]}")
        output = output.float()
        estimate = output[:, :channels]
        mse = (estimate - noise).square().flatten(1).mean(1)
        if output.shape[1] == channels:
            return Losses(mse, mse, torch.zeros_like(mse))

        # Both means are weight * x_0 + (the same multiple of x_t), with weight 1 and nothing of x_t at t = 0.
        clean = (noisy - _of(self._noise, timesteps) * estimate.detach()) / _of(self._signal, timesteps)
        error = _of(self._posterior_weight, timesteps) * (images - clean)
        true_log_variance = _of(self._log_posterior_variance, timesteps)
        share = (output[:, channels:] + 1) / 2
        log_variance = share * _of(self._log_beta, timesteps) + (1 - share) * true_log_variance

        difference = log_variance - true_log_variance
        divergence = (difference - 1 + torch.exp(-difference) + error.square() * torch.exp(-log_variance)) / 2
        surprise = -discretised_log_likelihood(images, error, log_variance)
        nats = torch.where(timesteps.view(-1, 1, 1, 1) == 0, surprise, divergence)
        variational = nats.flatten(1).mean(1) / math.log(2)
        return Losses(mse + variational, mse, variational)


def discretised_log_likelihood(images: Tensor, error: Tensor, log_variance: Tensor) -> Tensor:
    """Log of the mass that a Gaussian puts on each value's bin, in nats (DDPM, Eq. 13).

    Bins are 2/255 wide around the value; those of -1 and 1 reach to infinity. `error` is the value minus the mean; all
    three tensors have one shape. A bin is never given less than 1e-12 of the tail that begins at its inner edge.
    """
    deviation = torch.exp(log_variance / 2)
    up_to = log_ndtr((1 / 255 + error) / deviation)
    from_on = log_ndtr((1 / 255 - error) / deviation)
    # By symmetry the bin's two edges can be taken below the mean, where the logarithm of the tail is exact.
    near, far = (log_ndtr((half - error.abs()) / deviation) for half in (1 / 255, -1 / 255))
    within = near + torch.log(-torch.expm1((far - near).clamp(max=-1e-12)))
    return torch.where(images < -0.999, up_to, torch.where(images > 0.999, from_on, within))


def timesteps_of(sampler: Sampler, steps: int) -> list[int]:
    """The time steps that a sampler visits, in falling order; ValueError unless 1 <= steps <= 1000.

    "ddpm": `steps` values evenly from 999 to 0, both ends included, rounded, as DiT respaces. (Where a value lies
    halfway between two, which takes an odd number of steps, DiT's running sum may round it to the other one. A single
    step is at 0.)
    "ddim": every (1000 / steps)-th down from 999, so that the first step starts from pure noise, as it is given.
    "dpm-solver++": from 999 to 0, as evenly in log(alpha_bar / (1 - alpha_bar)) as numbers that are all different can
    be. (A single step is at 999.)
    """
    if not 1 <= steps <= NUM_TIMESTEPS:
        raise ValueError(f"steps must be in 1..{NUM_TIMESTEPS}; got {steps}")
    if sampler == "ddpm":
        return [round((NUM_TIMESTEPS - 1) * step / max(steps - 1, 1)) for step in reversed(range(steps))]
    if sampler == "ddim":
        return [round(NUM_TIMESTEPS * step / steps) - 1 for step in range(steps, 0, -1)]
    if sampler == "dpm-solver++":
        logits = torch.logit(alpha_bars()).numpy()
        nearest = np.abs(logits - np.linspace(logits[-1], logits[0], steps)[:, None]).argmin(1)
        found = [int(nearest[-1])]
        for step in range(steps - 2, -1, -1):
            found.append(min(max(int(nearest[step]), found[-1] + 1), NUM_TIMESTEPS - 1 - step))
        return found[::-1]
    raise ValueError(f"unknown sampler {sampler!r}: choose ddpm, ddim or dpm-solver++")


def dpm_solver(timesteps: Sequence[int]) -> Any:
    """diffusers' DPM-Solver++(2M), from one of the time steps to the next; its steps take estimates of x_0."""
    from diffusers import DPMSolverMultistepScheduler

    solver: Any = DPMSolverMultistepScheduler(
        **NOISE_SCHEDULE, algorithm_type="dpmsolver++", solver_order=2, prediction_type="sample"
    )
    solver.set_timesteps(timesteps=list(timesteps))
    return solver


def seeds_of(seed: int, indices: Iterable[int]) -> list[int]:
    """A seed for `sample` for each image number: it depends on `seed` and the number alone; neither may be negative."""
    words = (np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0] for index in indices)
    return [int(word) for word in words]


def check_sampling(
    model: DiffusionTransformer, *, sampler: Sampler, steps: int, guidance: float, guided_channels: GuidedChannels
) -> None:
    """Raises ValueError where `sample` could not draw from the model with these options."""
    timesteps_of(sampler, steps)
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite; got {guidance}")
    if guided_channels not in ("all", "three"):
        raise ValueError(f"unknown guided_channels {guided_channels!r}: choose all or three")
    if guided_channels == "three" and model.config.in_channels < 3:
        raise ValueError(
            f"guided_channels 'three' needs a model of 3 channels or more; this one has {model.config.in_channels}"
        )


@torch.inference_mode()
def sample(
    model: DiffusionTransformer,
    labels: Tensor,
    *,
    size: int,
    seeds: Sequence[int],
    sampler: Sampler = "ddpm",
    steps: int = 250,
    guidance: float = 1.0,
    guided_channels: GuidedChannels = "all",
    clip: bool,
    progress: bool = True,
) -> Tensor:
    """Draws one image for each label (n,) int64: (n, C, size, size) float32 on the model's device.

    The noise of image i comes from a generator on the CPU seeded with seeds[i]: the start, then one for each step of
    "ddpm" but the last. So a seed means the same noise on every device and in every batch. "ddim" (eta = 0) and
    "dpm-solver++" are deterministic; "ddpm" takes the learned variance, or that of the posterior where the model has
    none.

    `guidance` g makes the noise eps(null) + g (eps(label) - eps(null)), both in one pass of the model; at 1 the null
    half is left out. It acts on "all" channels, or on the first "three", as in DiT, where the fourth channel of the
    latent stays that of the label; the variance always does. `clip` keeps the estimate of the clean image in -1..1:
    right for pixels, wrong for latents.

    Raises ValueError, before any work, for what `check_sampling` refuses, labels out of range and too few seeds.
    """
    check_sampling(model, sampler=sampler, steps=steps, guidance=guidance, guided_channels=guided_channels)
    if labels.ndim != 1 or len(labels) == 0 or labels.min() < 0 or labels.max() > model.null_class:
        raise ValueError(f"labels must be a vector of numbers in 0..{model.null_class}; got {labels}")
    if len(seeds) != len(labels):
        raise ValueError(f"seeds must be one for each of {len(labels)} labels; got {len(seeds)}")

    timesteps = timesteps_of(sampler, steps)
    channels = model.config.in_channels
    device = next(model.parameters()).device
    guided = channels if guided_channels == "all" else 3
    labels = labels.to(device)
    both_labels = torch.cat([labels, torch.full_like(labels, model.null_class)])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw() -> Tensor:
        noises = [torch.randn(channels, size, size, generator=generator) for generator in generators]
        return torch.stack(noises).to(device)

    def estimate(images: Tensor, timestep: int) -> Tensor:
        if guidance == 1:
            return model(images, torch.full_like(labels, timestep), labels).float()
        output = model(torch.cat([images, images]), torch.full_like(both_labels, timestep), both_labels).float()
        given, null = output.chunk(2)
        steered = null[:, :guided] + guidance * (given[:, :guided] - null[:, :guided])
        return torch.cat([steered, given[:, guided:]], dim=1)

    levels = [*alpha_bars()[timesteps].tolist(), 1.0]
    solver = dpm_solver(timesteps) if sampler == "dpm-solver++" else None
    images = draw()
    for step, timestep in enumerate(tqdm(timesteps, unit="step", desc="sample", leave=False, disable=not progress)):
        output, here, there = estimate(images, timestep), levels[step], levels[step + 1]
        clean = (images - math.sqrt(1 - here) * output[:, :channels]) / math.sqrt(here)
        if clip:
            clean = clean.clamp(-1, 1)
        if solver is not None:
            images = solver.step(clean, timestep, images, return_dict=False)[0]
        elif sampler == "ddim":
            # The noise must follow the clipped estimate, or the two disagree and the error grows from step to step.
            noise = (images - math.sqrt(here) * clean) / math.sqrt(1 - here)
            images = math.sqrt(there) * clean + math.sqrt(1 - there) * noise  # DDIM, Eq. 12
        else:
            images = posterior_mean(clean, images, here, there)
            if there < 1:
                images = images + posterior_deviation(output[:, channels:], here, there) * draw()
    return images


def posterior_mean(clean: Tensor, noisy: Tensor, here: float, there: float) -> Tensor:
    """Mean of the image at level `there`, given a clean and a noisy one at level `here` (DDPM, Eq. 7).

    Levels are values of alpha_bar, so that respaced steps (arXiv 2102.09672, Eq. 19) need no tables of their own.
    """
    alpha = here / there
    return math.sqrt(there) * (1 - alpha) / (1 - here) * clean + math.sqrt(alpha) * (1 - there) / (1 - here) * noisy


def posterior_deviation(v: Tensor, here: float, there: float) -> Tensor | float:
    """Standard deviation of the step from `here` to `there` < 1: as v says, or the posterior's if v has no channels."""
    beta = 1 - here / there
    smallest = beta * (1 - there) / (1 - here)
    if v.shape[1] == 0:
        return math.sqrt(smallest)
    share = (v + 1) / 2
    return torch.exp((share * math.log(beta) + (1 - share) * math.log(smallest)) / 2)


def alpha_bars() -> Tensor:
    """(1000,) float64: the share of the signal's variance left in x_t."""
    betas = torch.linspace(NOISE_SCHEDULE["beta_start"], NOISE_SCHEDULE["beta_end"], NUM_TIMESTEPS, dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0)


def _of(table: Tensor, timesteps: Tensor) -> Tensor:
    """The entry of each image's time step, to be multiplied with (B, C, h, w)."""
    return table[timesteps].view(-1, 1, 1, 1)
