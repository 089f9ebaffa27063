"""Which images a step sees, and what is drawn for each of them."""

from itertools import chain
from typing import Any

import pytest
import torch

pytest.importorskip("examples.dydi_lit")

from examples.dydi_lit.batches import RandomisedData, Share, StepSampler, load_batches
from examples.dydi_lit.data import DigitData


def rows(share: Share, *, length: int = 23, start: int = 0, stop: int = 6, seed: int = 0) -> list[list[Any]]:
    return list(StepSampler(length, share, seed, start, stop))


def test_shares_divide_a_step() -> None:
    whole = rows(Share(8))
    assert [len(row) for row in whole] == [8] * 6
    halves = [rows(Share(8, 2, 2, process)) for process in range(2)]
    for step, row in enumerate(whole):
        parts = [halves[process][2 * step + part] for part in range(2) for process in range(2)]
        assert list(chain(*parts)) == row


def test_an_epoch_shows_an_image_once_at_most() -> None:
    steps = rows(Share(8))
    epochs = [steps[first] + steps[first + 1] for first in (0, 2, 4)]
    indices = [[index for index, _ in epoch] for epoch in epochs]
    assert all(len(set(epoch)) == 16 and set(epoch) <= set(range(23)) for epoch in indices)
    assert indices[0] != indices[1] != indices[2]
    assert len({seed for epoch in epochs for _, seed in epoch}) == 48
    assert rows(Share(8), start=3) == rows(Share(8))[3:]
    assert rows(Share(8), seed=1) != rows(Share(8))


def test_what_is_drawn_for_an_image() -> None:
    data = RandomisedData(DigitData(), label_dropout=0.1, flip=True)
    data.data.takes_noise = True  # as latents do
    sampler = StepSampler(len(data.data), Share(1000), 0, 0, 3)
    batches = list(load_batches(data, sampler, 0, torch.device("cpu")))
    stored, labels, timesteps, noise, flip, posterior_noise = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert stored.shape == noise.shape == posterior_noise.shape == (3000, 1, 8, 8)
    assert noise.dtype == posterior_noise.dtype == torch.float32
    assert labels.dtype == timesteps.dtype == torch.int64 and flip.dtype == torch.bool

    dropped = labels == 10
    assert 0.08 < dropped.float().mean() < 0.12 and 0.46 < flip.float().mean() < 0.54
    true = {
        image.numpy().tobytes(): int(label) for image, label in zip(data.data.images, data.data.labels, strict=True)
    }
    assert all(
        label == true[image.numpy().tobytes()] for image, label in zip(stored[~dropped], labels[~dropped], strict=True)
    )
    assert timesteps.min() < 5 and timesteps.max() > 994 and abs(timesteps.float().mean() - 499.5) < 20
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs((noise * posterior_noise).mean()) < 0.01


def test_labels_and_flips_can_be_left_alone() -> None:
    data = RandomisedData(DigitData(), label_dropout=0.0, flip=False)
    (batch,) = load_batches(data, StepSampler(len(data.data), Share(1000), 0, 0, 1), 0, torch.device("cpu"))
    assert batch.labels.max() == 9 and not batch.flip.any()


def test_noise_of_the_posterior_is_drawn_for_those_who_take_it_and_changes_nothing_else() -> None:
    data = RandomisedData(DigitData(), label_dropout=0.1, flip=True)
    item = (3, (1, 0, 0, 5))
    plain = data[item]
    data.data.takes_noise = True
    sampled = data[item]
    assert plain.posterior_noise.numel() == 0 and sampled.posterior_noise.shape == sampled.noise.shape
    for one, other in zip(plain[:-1], sampled[:-1], strict=True):
        assert torch.equal(one, other)
