"""The loss against the papers' formulas, written a second time in float64 and without tables."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_ndtr

pytest.importorskip("examples.dydi_lit")

from torch import Tensor

from examples.dydi_lit import diffusion
from examples.dydi_lit.diffusion import GaussianDiffusion
from tests.dydi_lit.schedule import ALPHA_BAR, SIZE, beta

# --- the formulas, scalar by scalar in Python's floats


def posterior(t: int) -> tuple[float, float, float]:
    """Weights of x_0 and x_t in the mean of q(x_{t-1} | x_t, x_0), and its variance (DDPM, Eqs. 6 and 7)."""
    now, before = ALPHA_BAR[t], ALPHA_BAR[t - 1] if t else 1.0
    return (
        math.sqrt(before) * beta(t) / (1 - now),
        math.sqrt(1 - beta(t)) * (1 - before) / (1 - now),
        (1 - before) / (1 - now) * beta(t),
    )


def log_of_difference(larger: np.ndarray, smaller: np.ndarray) -> np.ndarray:
    return larger + np.log(-np.expm1(smaller - larger))


def bound_in_bits(eps: np.ndarray, v: np.ndarray, x0: np.ndarray, xt: np.ndarray, t: int) -> float:
    """L_t of DDPM's Eq. 5, t > 0, or L_0 of its Eq. 13, with the variance of arXiv 2102.09672, Eq. 15."""
    weight_0, weight_t, true_variance = posterior(t)
    least = math.log(posterior(max(t, 1))[2])
    log_variance = (v + 1) / 2 * math.log(beta(t)) + (1 - v) / 2 * least
    clean = xt / math.sqrt(ALPHA_BAR[t]) - math.sqrt(1 / ALPHA_BAR[t] - 1) * eps
    mean = weight_0 * clean + weight_t * xt
    if t > 0:
        true_mean = weight_0 * x0 + weight_t * xt
        ratio = true_variance / np.exp(log_variance)
        nats = 0.5 * (ratio - 1 - np.log(ratio) + (true_mean - mean) ** 2 / np.exp(log_variance))
    else:
        deviation = np.exp(log_variance / 2)
        high, low = (x0 + 1 / 255 - mean) / deviation, (x0 - 1 / 255 - mean) / deviation
        # Phi(high) - Phi(low), in whichever tail it is not a difference of two ones
        middle = np.where(
            high + low < 0,
            log_of_difference(log_ndtr(high), log_ndtr(low)),
            log_of_difference(log_ndtr(-low), log_ndtr(-high)),
        )
        nats = -np.where(x0 == -1, log_ndtr(high), np.where(x0 == 1, log_ndtr(-low), middle))
    return float(nats.mean()) / math.log(2)


def loss_case(t: int, v_scale: float, error: float) -> tuple[Tensor, ...]:
    """output, images, noisy, noise, timesteps of five images, some of whose pixels are black or white."""
    generator = torch.Generator().manual_seed(t)
    images = (torch.randint(0, 256, (5, 2, SIZE, SIZE), generator=generator) / 127.5 - 1).float()
    images[:, 0, 0], images[:, 0, 1] = -1, 1
    noise = torch.randn(images.shape, generator=generator)
    timesteps = torch.full((5,), t)
    noisy = GaussianDiffusion().add_noise(images, noise, timesteps)
    eps = noise + error * torch.randn(images.shape, generator=generator)
    v = v_scale * torch.randn(images.shape, generator=generator)
    return torch.cat([eps, v], 1), images, noisy, noise, timesteps


@pytest.mark.parametrize("t", [0, 1, 2, 37, 500, 999])
@pytest.mark.parametrize("v_scale, error", [(0.5, 0.1), (0.0, 0.0), (1.0, 1.0), (8.0, 0.3)])
def test_losses_are_the_formulas(t: int, v_scale: float, error: float) -> None:
    output, images, noisy, noise, timesteps = loss_case(t, v_scale, error)
    losses = GaussianDiffusion().losses(output, images, noisy, noise, timesteps)
    assert all(loss.shape == (5,) and loss.dtype == torch.float32 for loss in losses)
    torch.testing.assert_close(losses.total, losses.mse + losses.variational)
    exact = [tensor.double().numpy() for tensor in (output, images, noisy, noise)]
    for i in range(5):
        eps, v = np.split(exact[0][i], 2)
        assert losses.mse[i].item() == pytest.approx(((eps - exact[3][i]) ** 2).mean(), rel=1e-6, abs=1e-12)
        expected = bound_in_bits(eps, v, exact[1][i], exact[2][i], t)
        # The rounding of the noisy image, over its deviation from the mean, is squared in the bound.
        assert losses.variational[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_each_image_has_its_own_time_step() -> None:
    cases = [loss_case(t, 0.5, 0.2) for t in (0, 1, 640, 999)]
    mixed = [torch.cat([case[part][i : i + 1] for i, case in enumerate(cases)]) for part in range(5)]
    together = GaussianDiffusion().losses(*mixed)
    for i, case in enumerate(cases):
        alone = GaussianDiffusion().losses(*case)
        assert [loss[i].item() for loss in together] == pytest.approx([loss[i].item() for loss in alone], rel=1e-6)


def test_without_learned_variance_the_loss_is_that_of_the_noise() -> None:
    output, *rest = loss_case(300, 0.5, 0.2)
    learned, fixed = GaussianDiffusion().losses(output, *rest), GaussianDiffusion().losses(output[:, :2], *rest)
    assert torch.equal(fixed.total, learned.mse) and torch.equal(fixed.mse, learned.mse)
    assert not fixed.variational.any()


@pytest.mark.parametrize("t", [0, 1, 700])
def test_the_bound_trains_the_variance_only(t: int) -> None:
    output, *rest = loss_case(t, 3.0, 2.0)
    output.requires_grad_()
    losses = GaussianDiffusion().losses(output, *rest)
    (of_bound,) = torch.autograd.grad(losses.variational.sum(), output, retain_graph=True)
    assert not of_bound[:, :2].any()
    assert of_bound[:, 2:].isfinite().all() and of_bound[:, 2:].all()
    (of_mse,) = torch.autograd.grad(losses.mse.sum(), output)
    assert of_mse[:, :2].all() and not of_mse[:, 2:].any()


@pytest.mark.parametrize("error", [0.0, 10.0, 1e4])
def test_likelihood_and_its_gradient_are_finite_far_from_the_mean(error: float) -> None:
    log_variance = torch.tensor([-30.0, -9.0, 0.0, 30.0], requires_grad=True)
    likelihood = diffusion.discretised_log_likelihood(torch.zeros(4), torch.full((4,), error), log_variance)
    assert likelihood.isfinite().all() and (likelihood <= 0).all()
    likelihood.sum().backward()
    assert log_variance.grad is not None and log_variance.grad.isfinite().all()


def test_the_bins_hold_the_whole_mass() -> None:
    values = torch.arange(256) / 127.5 - 1
    for mean, log_variance in ((0.3, -9.0), (-0.99, -4.0), (2.0, 1.0)):
        likelihood = diffusion.discretised_log_likelihood(values, values - mean, torch.full((256,), log_variance))
        assert likelihood.exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_noise_is_added_as_the_schedule_says() -> None:
    images, noise = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), -2.0)
    for t in (0, 1, 500, 999):
        expected = 3 * math.sqrt(ALPHA_BAR[t]) - 2 * math.sqrt(1 - ALPHA_BAR[t])
        assert GaussianDiffusion().add_noise(images, noise, torch.tensor([t])).item() == pytest.approx(expected)
    assert GaussianDiffusion.num_timesteps == 1000


def test_output_of_other_channels_is_refused() -> None:
    output, *rest = loss_case(1, 1.0, 1.0)
    with pytest.raises(ValueError, match="output must have 2 or 4 channels; got 3"):
        GaussianDiffusion().losses(output[:, :3], *rest)
