"""The steps that are predicted, and timed by :mod:`benchmarks.kernels`: the layer forward and backward.

On the meta device a step makes the launches that it would make on a GPU, in the form that a GPU gets, without data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import isqrt
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from benchmarks import harness
from benchmarks.harness import Call, Row
from dydila_kernels import DyDiLAttention

PREDICTIONS = harness.RESULTS / "predictions.jsonl"
PREDICTED_FOR = "NVIDIA H200"
NOTICE = f"Predictions are of a model of the machine code for one {PREDICTED_FOR}; times are of this device."
OPTIMISM = 1.4  # by which the model was too fast, at most, on kernels of known speed


class Setting(NamedTuple):
    """A layer and its tokens (B, N, d); ``form`` is that of :mod:`dydila_kernels.ops.forms`."""

    batch: int
    tokens: int
    dim: int
    heads: int
    convolution: bool = True
    form: str = "auto"

    def has(self, row: Row, mode: str) -> bool:
        """Whether a row is of this setting and mode."""
        return row["mode"] == mode and all(row[name] == value for name, value in self._asdict().items())


SETTINGS = (
    Setting(8, 4096, 768, 12),
    Setting(8, 4096, 768, 12, convolution=False),
    Setting(8, 4096, 768, 12, form="triton"),
    Setting(8, 1024, 768, 12),
    Setting(8, 16384, 768, 12),
    Setting(8, 4096, 1152, 16),
    Setting(8, 4096, 768, 1),
)
"""Those predicted; the first one is the shape of the goals."""


def title(row: Row) -> str:
    """The setting of a row in words."""
    words = "B={batch} N={tokens} d={dim} H={heads}".format(**row)
    form = "" if row["form"] == "auto" else f", in {row['form'].title()}"
    return words + form + ("" if row["convolution"] else ", no convolution")


def compared(us: float, predicted: Row, device: str) -> Row:
    """The prediction of a launch, and what is to be thought of it after ``us`` microseconds on the device."""
    fields = ("predicted_us", "fast_us", "slow_us", "floor_us", "binds", "lower_bound")
    row = {"predicted_for": PREDICTED_FOR, "predicted_commit": predicted["commit"], **{f: predicted[f] for f in fields}}
    if PREDICTED_FOR not in device:
        verdict = "another device"
    elif us < row["fast_us"]:
        verdict = "faster"
    elif us <= row["slow_us"]:
        verdict = "within the spread"
    elif row["lower_bound"]:
        verdict = "above a lower bound"
    else:
        verdict = f"at most {OPTIMISM} above" if us <= OPTIMISM * row["predicted_us"] else "slower"
    return {**row, "verdict": verdict}


@contextmanager
def in_form(form: str) -> Iterator[None]:
    """With the environment asking for that form of the kernels."""
    from dydila_kernels.ops import forms

    with patch.dict(os.environ, {forms.VARIABLE: form}):
        yield


def built(setting: Setting, device: str, dtype: torch.dtype) -> DyDiLAttention:
    """The layer, with random weights."""
    torch.manual_seed(0)
    options: dict[str, Any] = {} if setting.convolution else {"dwc_branches": ()}
    return DyDiLAttention(setting.dim, setting.heads, backend="triton", device=device, dtype=dtype, **options)


def step_of(attn: DyDiLAttention, setting: Setting) -> dict[str, Call]:
    """The calls of a step by mode, on random tokens; each forward pass is for the backward pass that follows."""
    made: list[torch.Tensor] = []
    x = torch.randn(*setting[:3], device=attn.proj.weight.device, dtype=attn.proj.weight.dtype)
    leaf = x.detach().requires_grad_()
    leaves = [leaf, *(p for p in attn.parameters() if p.requires_grad)]
    side = isqrt(setting.tokens)
    return {
        "forward": lambda: made.append(attn(leaf, HW=(side, side))),
        "backward": lambda: torch.autograd.grad(made.pop(), leaves, x),
    }


@contextmanager
def noting(note: Callable[..., object]) -> Iterator[None]:
    """Calls of the layer, on the meta device too, hand their launches to ``note``."""
    from dydila_kernels.ops import autograd, operators, tiles

    with (
        patch.object(tiles, "launcher", note),
        patch.object(autograd, "can_bypass_dispatcher", lambda t: True),
        patch.object(operators, "can_bypass_dispatcher", lambda t: True),
    ):
        yield


@cache
def launched(setting: Setting, dtype: torch.dtype) -> dict[str, list[str]]:
    """The kernels that a step launches, by mode and in order, found without launching any."""
    found: dict[str, list[str]] = {}
    names: list[str] = []
    with in_form(setting.form), noting(lambda kernel, *_: names.append(kernel.__name__)):
        for mode, call in step_of(built(setting, "meta", dtype), setting).items():
            call()
            found[mode], names[:] = [*names], []
    return found
