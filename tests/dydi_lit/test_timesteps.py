"""The time steps that the samplers visit, and the seeds of images."""

import numpy as np
import pytest

pytest.importorskip("examples.dydi_lit")

from examples.dydi_lit.diffusion import seeds_of, timesteps_of


@pytest.mark.parametrize("steps", [2, 10, 200, 250, 999, 1000])
def test_time_steps(steps: int) -> None:
    ddpm, ddim = timesteps_of("ddpm", steps), timesteps_of("ddim", steps)
    assert (ddpm[0], ddpm[-1], ddim[0], ddim[-1]) == (999, 0, 999, round(1000 / steps) - 1)
    for visited, stride in ((ddpm, 999 / (steps - 1)), (ddim, 1000 / steps)):
        gaps = -np.diff(visited)
        assert len(visited) == steps and all(abs(gap - stride) <= 1 and gap >= 1 for gap in gaps)


def test_time_steps_of_the_paper() -> None:
    assert timesteps_of("ddpm", 250)[:4] == [999, 995, 991, 987]  # stride 999 / 249 = 4.012
    assert timesteps_of("ddpm", 1) == [0] and timesteps_of("ddim", 1) == [999]
    assert timesteps_of("ddim", 4) == [999, 749, 499, 249]


def test_seeds_of_images() -> None:
    seeds = seeds_of(3, range(1000))
    assert len(set(seeds)) == 1000 and not set(seeds) & set(seeds_of(4, range(1000)))
    assert seeds_of(3, [17, 5]) == [seeds[17], seeds[5]]
