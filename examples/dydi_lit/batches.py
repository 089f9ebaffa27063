"""Which images a step sees and what it does with them, down to the noise, all from the seed and the step's number.

Nothing here depends on how many processes share a step, nor on what was drawn before: a resumed run has no random
state to restore, and one process computes what two do. Numbers are drawn on the CPU, where the workers of the
DataLoader load the images, so that they are the same for every device.
"""

import signal
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from examples.dydi_lit.data import ImageData
from examples.dydi_lit.diffusion import NUM_TIMESTEPS

_ORDER, _DRAWS = range(2)  # first word of every seed, so that no two purposes share random numbers


class Batch(NamedTuple):
    """Images of one process and accumulated part, with everything that is random about them."""

    stored: Tensor
    """(B, ...): the images as `ImageData` loads them."""
    labels: Tensor
    """(B,) int64, some of them replaced by the null class."""
    timesteps: Tensor
    """(B,) int64 in 0..999."""
    noise: Tensor
    """(B, C, h, w) float32, standard normal: what the network is to find."""
    flip: Tensor
    """(B,) bool: mirror this image."""
    posterior_noise: Tensor
    """(B, C, h, w) float32, standard normal, for `ImageData.to_images`; (B, 0) where that takes none."""

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(part.to(device, non_blocking=True) for part in self))


@dataclass(frozen=True)
class Share:
    """The part of every step's images that one process computes: `accumulate` batches of `size`."""

    batch_size: int
    """Images of a step, over all processes and accumulated parts."""
    accumulate: int = 1
    processes: int = 1
    process: int = 0

    @property
    def size(self) -> int:
        return self.batch_size // (self.accumulate * self.processes)

    def parts(self) -> Iterator[range]:
        """Which images of the step, from 0, this process takes at once."""
        for part in range(self.accumulate):
            first = (part * self.processes + self.process) * self.size
            yield range(first, first + self.size)


class StepSampler(Sampler[list[tuple[int, tuple[int, ...]]]]):
    """For each step in start..stop-1 and each part of `share`, the indices of its images, each with its own seed.

    An epoch is a random order of all `length` images, without those at its end that fill no step.
    """

    def __init__(self, length: int, share: Share, seed: int, start: int, stop: int) -> None:
        self.length, self.share, self.seed, self.steps = length, share, seed, range(start, stop)

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
        count, order, order_epoch = self.share.batch_size, np.empty(0, np.int64), -1
        for step in self.steps:
            epoch, done = divmod(step, self.length // count)
            if epoch != order_epoch:
                order = np.random.default_rng((_ORDER, self.seed, epoch)).permutation(self.length)
                order_epoch = epoch
            for numbers in self.share.parts():
                yield [(int(order[done * count + number]), (_DRAWS, self.seed, step, number)) for number in numbers]


class RandomisedData(Dataset[Batch]):
    """The images of `data` with what the seed of each draws: one row of a `Batch`."""

    def __init__(self, data: ImageData, label_dropout: float, flip: bool) -> None:
        self.data, self.label_dropout, self.flip = data, label_dropout, flip

    def __getitem__(self, item: tuple[int, tuple[int, ...]]) -> Batch:
        index, seed = item
        stored, label = self.data[index]
        random, shape = np.random.default_rng(seed), (self.data.channels, self.data.size, self.data.size)
        timestep = random.integers(NUM_TIMESTEPS)
        dropped, flipped = random.random(2) < (self.label_dropout, 0.5 if self.flip else 0)
        noise = random.standard_normal(shape, np.float32)
        # Last, so that nothing else depends on whether it is drawn.
        posterior_noise = random.standard_normal(shape if self.data.takes_noise else 0, np.float32)
        return Batch(
            stored,
            torch.tensor(self.data.num_classes if dropped else label),
            torch.tensor(timestep),
            torch.from_numpy(noise),
            torch.tensor(flipped),
            torch.from_numpy(posterior_noise),
        )


def load_batches(
    data: RandomisedData, sampler: StepSampler, num_workers: int, device: torch.device
) -> Generator[Batch, None, None]:
    """The batches that `sampler` asks for, on `device`, loaded by that many workers ahead of time (0: none).

    A generator, to be closed when it is left before its end: that tells the workers to end.
    """
    loader = DataLoader(
        data,
        batch_sampler=sampler,
        num_workers=num_workers,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        data.data.warn()
        yield batch.to(device)


def leave_signals_to_parent(worker: int) -> None:
    """Lets a worker live through the Ctrl-C after which its parent still finishes a step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
