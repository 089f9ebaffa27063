"""Loss and samplers against the papers' formulas, written a second time in float64 and without tables."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.special import log_ndtr

pytest.importorskip("examples.dydi_lit")

from torch import Tensor, nn

from examples.dydi_lit import diffusion
from examples.dydi_lit.configs import config_of
from examples.dydi_lit.diffusion import GaussianDiffusion, sample
from examples.dydi_lit.model import DiffusionTransformer

EPS = torch.finfo(torch.float32).eps
SIZE = 4


# --- the formulas, scalar by scalar in Python's floats


def beta(t: int) -> float:
    return 1e-4 + (2e-2 - 1e-4) * t / 999


ALPHA_BAR = [math.prod(1 - beta(s) for s in range(t + 1)) for t in range(1000)]


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


# --- samplers


class Watched(nn.Module):
    """A model that keeps what it was given and what it returned."""

    def __init__(self, model: DiffusionTransformer) -> None:
        super().__init__()
        self.model, self.config, self.null_class = model, model.config, model.null_class
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def forward(self, images: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        output = self.model(images, timesteps, labels)
        self.calls.append((images, timesteps, labels, output))
        return output


def watched(channels: int = 4, learn_sigma: bool = True) -> Watched:
    config = config_of(
        "dydi-lit",
        "tiny",
        dim=16,
        depth=1,
        in_channels=channels,
        num_classes=3,
        learn_sigma=learn_sigma,
        initialization="dit",  # its small embeddings leave random networks tame
    )
    model = DiffusionTransformer(config)
    for name, weight in model.named_parameters():
        if name.startswith(("output", "modulation")):
            nn.init.normal_(weight, std=0.3)
    return Watched(model.eval())


def draw(model: Watched, labels: Sequence[int] = (0, 2), **options: object) -> Tensor:
    arguments = {"size": SIZE, "seeds": range(len(labels)), "clip": False, "progress": False, **options}
    return sample(model, torch.tensor(labels), **arguments)  # type: ignore[arg-type]


def noises_of(seeds: Sequence[int], channels: int, count: int) -> list[np.ndarray]:
    """The first `count` noises of each seed, (n, C, h, w) float64."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (channels, SIZE, SIZE)
    return [torch.stack([torch.randn(shape, generator=g) for g in generators]).double().numpy() for _ in range(count)]


def respaced(steps: int) -> tuple[list[int], list[float]]:
    """DiT's process of fewer steps: the time steps kept, and betas that give them the same alpha_bar."""
    kept = sorted({round(i * 999 / max(steps - 1, 1)) for i in range(steps)})
    betas, last = [], 1.0
    for t in kept:
        betas.append(1 - ALPHA_BAR[t] / last)
        last = ALPHA_BAR[t]
    return kept, betas


def guided(output: np.ndarray, guidance: float, guided_channels: str) -> tuple[np.ndarray, np.ndarray]:
    """The noise, with guidance, and v (or no channels) of what the model said of both halves, or of one."""
    if guidance == 1:
        return output[:, :4], output[:, 4:]
    label, null = np.split(output, 2)
    eps = null + guidance * (label - null)
    if guided_channels == "three":
        eps[:, 3] = label[:, 3]
    return eps[:, :4], label[:, 4:]


GUIDANCE = [(1.0, "all"), (2.5, "all"), (2.5, "three"), (0.0, "all")]


def states_of(model: Watched, result: Tensor, guidance: float) -> list[np.ndarray]:
    """x before each step, and after the last."""
    count = len(result)
    for images, _, labels, _ in model.calls:
        assert len(images) == count * (1 if guidance == 1 else 2)
        assert labels[:count].tolist() == [0, 2] and (labels[count:] == 3).all()
        assert guidance == 1 or torch.equal(images[:count], images[count:])
    return [images[:count].double().numpy() for images, *_ in model.calls] + [result.double().numpy()]


def assert_close(found: np.ndarray, expected: np.ndarray, *terms: np.ndarray) -> None:
    """To the rounding of a few float32 operations on `terms`."""
    scale = sum(np.abs(term) for term in terms)
    assert (np.abs(found - expected) <= 4 * EPS * scale + 1e-12).all(), np.abs(found - expected).max()


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("guidance, guided_channels", GUIDANCE)
@pytest.mark.parametrize("steps", [1, 2, 10, 31])
def test_ddpm_is_dits_respaced_process(
    steps: int, guidance: float, guided_channels: str, clip: bool, learn_sigma: bool
) -> None:
    model = watched(learn_sigma=learn_sigma)
    result = draw(model, sampler="ddpm", steps=steps, guidance=guidance, guided_channels=guided_channels, clip=clip)
    check_ddpm(model, result, steps, guidance, guided_channels, clip)


@pytest.mark.parametrize("steps", [250, 1000])
def test_ddpm_of_many_steps(steps: int) -> None:
    model = watched()
    check_ddpm(model, draw(model, sampler="ddpm", steps=steps), steps, 1.0, "all", False)


def check_ddpm(model: Watched, result: Tensor, steps: int, guidance: float, guided_channels: str, clip: bool) -> None:
    kept, betas = respaced(steps)
    assert len(model.calls) == steps and result.shape == (2, 4, SIZE, SIZE) and result.dtype == torch.float32
    states = states_of(model, result, guidance)
    noises = noises_of((0, 1), 4, steps)
    assert np.array_equal(states[0], noises[0])
    alphas = 1 - np.array(betas)
    for i, (_, timesteps, _, output) in enumerate(model.calls):
        k = steps - 1 - i  # place in the respaced process
        assert (timesteps == kept[k]).all()
        bar, before = np.prod(alphas[: k + 1]), np.prod(alphas[:k])
        eps, v = guided(output.double().numpy(), guidance, guided_channels)
        x = states[i]
        parts = x / np.sqrt(bar), np.sqrt(1 / bar - 1) * eps
        clean = np.clip(parts[0] - parts[1], -1, 1) if clip else parts[0] - parts[1]
        weight_0, weight_t = (
            np.sqrt(before) * betas[k] / (1 - bar),
            np.sqrt(alphas[k]) * (1 - before) / (1 - bar),
        )
        expected = weight_0 * clean + weight_t * x
        terms = [weight_t * x, *(weight_0 * part for part in parts)]
        if k > 0:
            least = (1 - before) / (1 - bar) * betas[k]
            variance = least ** ((1 - v) / 2) * betas[k] ** ((1 + v) / 2) if v.size else least
            step_noise = np.sqrt(variance) * noises[i + 1]
            expected = expected + step_noise
            exponent = 1 + np.abs(np.log(variance)) + np.abs(v if v.size else 0) * np.log(betas[k] / least)
            terms.append(step_noise * exponent)  # exp magnifies the rounding of its argument
        assert_close(states[i + 1], expected, *terms)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("guidance, guided_channels", GUIDANCE)
@pytest.mark.parametrize("steps", [1, 7, 30])
def test_ddim_goes_from_each_time_step_to_the_next(
    steps: int, guidance: float, guided_channels: str, clip: bool
) -> None:
    model = watched()
    result = draw(model, sampler="ddim", steps=steps, guidance=guidance, guided_channels=guided_channels, clip=clip)
    states = states_of(model, result, guidance)
    assert np.array_equal(states[0], noises_of((0, 1), 4, 1)[0])
    visited = [int(timesteps[0]) for _, timesteps, _, _ in model.calls]
    levels = [ALPHA_BAR[t] for t in visited] + [1.0]
    for i, (_, _, _, output) in enumerate(model.calls):
        x, here, there = states[i], levels[i], levels[i + 1]
        eps, _ = guided(output.double().numpy(), guidance, guided_channels)
        parts = x / np.sqrt(here), np.sqrt(1 / here - 1) * eps
        clean = parts[0] - parts[1]
        if clip:
            clean = np.clip(clean, -1, 1)
            eps = (x - np.sqrt(here) * clean) / np.sqrt(1 - here)
        expected = np.sqrt(there) * clean + np.sqrt(1 - there) * eps
        ratio = np.sqrt((1 - there) / (1 - here))
        terms = (np.sqrt(there) * parts[0], np.sqrt(there) * parts[1], ratio * x, ratio * x, ratio * clean, eps * ratio)
        assert_close(states[i + 1], expected, *terms)


def test_the_samplers_find_the_mean_of_gaussian_data() -> None:
    """With the exact noise of data N(0.5, 0.4^2), which is linear in x, samples have that mean and deviation, but
    for the few per cent that 250 steps of the posterior's variance, the least there is, leave out."""

    class Exact(nn.Module):
        config, null_class = config_of("dydi-lit", "tiny", in_channels=1, num_classes=1, learn_sigma=False), 1

        def __init__(self) -> None:
            super().__init__()
            self.device = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
            bar = ALPHA_BAR[int(timesteps[0])]
            return math.sqrt(1 - bar) * (x - math.sqrt(bar) * 0.5) / (bar * 0.16 + 1 - bar)

    for sampler in ("ddpm", "ddim"):
        images = draw(Exact(), [0] * 200, sampler=sampler, steps=250, seeds=range(200))  # type: ignore[arg-type]
        assert images.mean().item() == pytest.approx(0.5, abs=0.02)
        assert images.std().item() == pytest.approx(0.4, rel=0.05)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_seed_of_an_image_decides_it(sampler: str) -> None:
    model = watched()
    together = draw(model, [0, 1, 2], sampler=sampler, steps=4, seeds=[5, 6, 7])
    alone = draw(model, [1], sampler=sampler, steps=4, seeds=[6])
    torch.testing.assert_close(alone[0], together[1])
    same = draw(model, [1, 1], sampler=sampler, steps=4, seeds=[6, 6])
    assert torch.equal(same[0], same[1])
    other = draw(model, [1, 1], sampler=sampler, steps=4, seeds=[6, 8])
    assert not torch.allclose(other[0], other[1])


def test_guidance_near_one_is_the_estimate_for_the_label() -> None:
    model = watched()
    plain, guided = draw(model, steps=5, guidance=1.0), draw(model, steps=5, guidance=1 + 1e-6)
    torch.testing.assert_close(guided, plain, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(draw(model, steps=5, guidance=3.0), plain, atol=1e-2)


def test_clipped_samples_stay_in_range() -> None:
    model = watched()
    assert draw(model, steps=5).abs().max() > 1
    for sampler in ("ddpm", "ddim"):
        assert draw(model, steps=5, sampler=sampler, clip=True).abs().max() <= 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, r"steps must be in 1\.\.1000; got 0"),
        ({"steps": 1001}, r"steps must be in 1\.\.1000; got 1001"),
        ({"sampler": "euler"}, "unknown sampler 'euler': choose ddpm or ddim"),
        ({"guidance": math.nan}, "guidance must be finite; got nan"),
        ({"guidance": math.inf}, "guidance must be finite; got inf"),
        ({"guided_channels": "two"}, "unknown guided_channels 'two'"),
        ({"labels": [0, 4]}, r"labels must be a vector of numbers in 0\.\.3"),
        ({"labels": [-1]}, r"labels must be a vector of numbers in 0\.\.3"),
        ({"labels": []}, r"labels must be a vector of numbers in 0\.\.3"),
        ({"labels": [0, 1], "seeds": [1]}, "seeds must be one for each of 2 labels; got 1"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(options: dict[str, object], message: str) -> None:
    model = watched()
    with pytest.raises(ValueError, match=message):
        draw(model, **options)  # type: ignore[arg-type]
    assert not model.calls


def test_three_channels_need_three_channels() -> None:
    with pytest.raises(ValueError, match="needs a model of 3 channels or more; this one has 1"):
        draw(watched(channels=1), guided_channels="three")
