"""The samplers against the papers' formulas, written a second time in float64."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

pytest.importorskip("examples.dydi_lit")

from torch import Tensor, nn

from examples.dydi_lit.configs import config_of
from examples.dydi_lit.diffusion import sample
from examples.dydi_lit.model import DiffusionTransformer
from tests.dydi_lit.schedule import ALPHA_BAR, EPS, SIZE


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


class Exact(nn.Module):
    """The exact noise of data N(0.5, 0.4^2), which is linear in x."""

    config, null_class = config_of("dydi-lit", "tiny", in_channels=1, num_classes=1, learn_sigma=False), 1

    def __init__(self) -> None:
        super().__init__()
        self.device = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        bar = ALPHA_BAR[int(timesteps[0])]
        return math.sqrt(1 - bar) * (x - math.sqrt(bar) * 0.5) / (bar * 0.16 + 1 - bar)


def test_the_samplers_find_the_mean_of_gaussian_data() -> None:
    """But for the few per cent that 250 steps of the posterior's variance, the least there is, leave out."""
    for sampler in ("ddpm", "ddim", "dpm-solver++"):
        images = draw(Exact(), [0] * 200, sampler=sampler, steps=250, seeds=range(200))  # type: ignore[arg-type]
        assert images.mean().item() == pytest.approx(0.5, abs=0.02)
        assert images.std().item() == pytest.approx(0.4, rel=0.05)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("guidance, guided_channels", GUIDANCE)
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_dpm_solver_is_its_second_order_multistep_form(
    steps: int, guidance: float, guided_channels: str, clip: bool
) -> None:
    """Algorithm 2 of arXiv 2211.01095, first and last step of first order; the schedule of diffusers is float32."""
    model, sampler = watched(), "dpm-solver++"
    result = draw(model, sampler=sampler, steps=steps, guidance=guidance, guided_channels=guided_channels, clip=clip)
    states = states_of(model, result, guidance)
    assert np.array_equal(states[0], noises_of((0, 1), 4, 1)[0])
    levels = [ALPHA_BAR[int(timesteps[0])] for _, timesteps, _, _ in model.calls] + [1.0]
    logs = [0.5 * math.log(bar / (1 - bar)) for bar in levels[:-1]]
    before = np.zeros_like(states[0])
    for i, (_, _, _, output) in enumerate(model.calls):
        x, here, there = states[i], levels[i], levels[i + 1]
        eps, _ = guided(output.double().numpy(), guidance, guided_channels)
        clean = (x - np.sqrt(1 - here) * eps) / np.sqrt(here)
        clean = np.clip(clean, -1, 1) if clip else clean
        if i == steps - 1:
            expected = clean
        else:
            step, ratio = logs[i + 1] - logs[i], np.sqrt((1 - there) / (1 - here))
            last = (clean - before) * step / (2 * (logs[i] - logs[i - 1])) if i else 0.0
            expected = ratio * x - np.sqrt(there) * math.expm1(-step) * (clean + last)
        np.testing.assert_allclose(states[i + 1], expected, atol=1e-4 * np.abs(clean).max())
        before = clean


def test_dpm_solver_is_nearer_than_ddim_in_ten_steps() -> None:
    """For the exact noise of Gaussian data, whose flow takes x to mean + deviation (x - sqrt(bar) mean) / spread."""
    options = {"seeds": range(50), "steps": 10}
    start = torch.from_numpy(noises_of(range(50), 1, 1)[0])
    bar = ALPHA_BAR[999]
    exact = 0.5 + 0.4 * (start - math.sqrt(bar) * 0.5) / math.sqrt(bar * 0.16 + 1 - bar)
    errors = {
        sampler: (draw(Exact(), [0] * 50, sampler=sampler, **options).double() - exact).abs().max().item()  # type: ignore[arg-type]
        for sampler in ("ddim", "dpm-solver++")
    }
    assert errors["dpm-solver++"] < 0.3 * errors["ddim"], errors


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm-solver++"])
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
    for sampler in ("ddpm", "ddim", "dpm-solver++"):
        assert draw(model, steps=5, sampler=sampler, clip=True).abs().max() <= 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, r"steps must be in 1\.\.1000; got 0"),
        ({"steps": 1001}, r"steps must be in 1\.\.1000; got 1001"),
        ({"sampler": "euler"}, "unknown sampler 'euler': choose ddpm, ddim or dpm-solver"),
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
