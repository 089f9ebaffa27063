"""The time steps that the samplers visit, and the seeds of images."""

import math

import numpy as np
import pytest

pytest.importorskip("examples.dydi_lit")

from examples.dydi_lit.diffusion import seeds_of, timesteps_of
from tests.dydi_lit.schedule import ALPHA_BAR


@pytest.mark.parametrize("steps", [2, 10, 200, 250, 999, 1000])
def test_time_steps(steps: int) -> None:
    ddpm, ddim = timesteps_of("ddpm", steps), timesteps_of("ddim", steps)
    assert (ddpm[0], ddpm[-1], ddim[0], ddim[-1]) == (999, 0, 999, round(1000 / steps) - 1)
    for visited, stride in ((ddpm, 999 / (steps - 1)), (ddim, 1000 / steps)):
        gaps = -np.diff(visited)
        assert len(visited) == steps and all(abs(gap - stride) <= 1 and gap >= 1 for gap in gaps)


@pytest.mark.parametrize("steps", [2, 10, 30, 200, 999, 1000])
def test_time_steps_of_dpm_solver(steps: int) -> None:
    visited = timesteps_of("dpm-solver++", steps)
    assert (visited[0], visited[-1], len(set(visited))) == (999, 0, steps) and visited == sorted(visited, reverse=True)
    if steps == 10:  # far apart, each is the nearest to its place
        logs = [math.log(ALPHA_BAR[t] / (1 - ALPHA_BAR[t])) for t in visited]
        assert np.diff(logs) == pytest.approx((logs[-1] - logs[0]) / 9, rel=0.1)
    assert timesteps_of("dpm-solver++", 1) == [999]


def test_time_steps_of_the_paper() -> None:
    assert timesteps_of("ddpm", 250)[:4] == [999, 995, 991, 987]  # stride 999 / 249 = 4.012
    assert timesteps_of("ddpm", 1) == [0] and timesteps_of("ddim", 1) == [999]
    assert timesteps_of("ddim", 4) == [999, 749, 499, 249]


def test_seeds_of_images() -> None:
    seeds = seeds_of(3, range(1000))
    assert len(set(seeds)) == 1000 and not set(seeds) & set(seeds_of(4, range(1000)))
    assert seeds_of(3, [17, 5]) == [seeds[17], seeds[5]]
