"""What the tests of data and training share: a picture, a small run, and ways to disturb it."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from examples.dydi_lit import configs, train
from examples.dydi_lit.checkpoint import load_ema_model, read_losses, read_state
from examples.dydi_lit.data import DigitData
from examples.dydi_lit.train import TrainConfig


class FewDigits(DigitData):
    """40 digits: five batches of eight to an epoch, so that seven steps cross into a second one."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.labels = self.images[:40], self.labels[:40]


def small_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TrainConfig:
    """Seven steps of eight of 40 digits with a network of two narrow blocks; signals are heeded after each."""
    monkeypatch.setitem(configs._SIZES, "tiny", {"dim": 32, "depth": 2, "ffn_ratio": 1.0})
    monkeypatch.setitem(configs._DIT_DEPTH, "tiny", 2)
    monkeypatch.setattr(train, "open_data", lambda *arguments: FewDigits())
    return TrainConfig(output=tmp_path / "run", steps=7, batch_size=8, warmup_steps=2, log_every=1)


def on_call(monkeypatch: pytest.MonkeyPatch, number: int, act: Any) -> None:
    """Lets `act` change the losses of the call with that number, from 1, of `train.batch_losses`."""
    whole, calls = train.batch_losses, []

    def batch_losses(*arguments: Any) -> Any:
        calls.append(None)
        losses = whole(*arguments)
        return act(losses) if len(calls) == number else losses

    monkeypatch.setattr(train, "batch_losses", batch_losses)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Sends SIGINT to this process in the middle of that call of `train.batch_losses`."""

    def act(losses: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return losses

    on_call(monkeypatch, number, act)


def assert_same(found: Path, expected: Path) -> None:
    """Everything in the two checkpoints is equal to the bit."""
    assert read_losses(found) == read_losses(expected)
    ours, theirs = read_state(found), read_state(expected)
    averages = [load_ema_model(folder, fuse=False).state_dict() for folder in (found, expected)]
    for one, other in ((ours.weights, theirs.weights), (ours.moments, theirs.moments), averages):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert ours.counters == theirs.counters


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth coloured picture, different for every seed."""
    across, down = np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 2, height))
    waves = [np.sin(across * (channel + 1) + down + seed) for channel in range(3)]
    return Image.fromarray(((np.stack(waves, -1) + 1) * 127).astype(np.uint8))
