"""Measures launch configurations for the sizes and the device at hand, for those who ask.

Nothing is tuned unasked: without a call of :func:`tune` the kernels run with the table of
:mod:`dydila_kernels.ops.configs`, the same on every machine.
"""

from __future__ import annotations

import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dydila_kernels import checks
from dydila_kernels.attention import DyDiLAttention
from dydila_kernels.functional import choose_backend

if TYPE_CHECKING:
    from dydila_kernels.ops.configs import Config, Key

GAIN = 0.99
"""A configuration takes the place of another if it needs at most this share of the time: less is noise."""


def tune(
    shapes: Sequence[tuple[int, int, int, int]],
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    training: bool = True,
    repeats: int = 20,
    **options: Any,
) -> dict[tuple[str, str, int], Config]:
    """Finds the fastest launch configuration of each stage of the layer, and uses them from now on in this process.

    For each shape, one stage after the other, configurations that differ from the present one in one number, or in rows
    and warps alike, are timed on the whole layer.  Each has to be compiled first: expect a minute or two for a shape.

    Args:
        shapes: (B, N, d, H) each; N is taken as one row of N columns where it is no square.
        dtype: of the tokens: float16, bfloat16 or float32.
        device: a device that the kernels run on.
        training: whether to time forward and backward, or the forward pass alone.
        repeats: calls to take the median of.
        options: other arguments of :class:`dydila_kernels.DyDiLAttention`.

    Returns:
        What was found better than the table, by (stage, precision, width), as in ``dydila_kernels.ops.configs.TUNED``,
        which holds it: assign to that in another process to use it there.

    Raises:
        RuntimeError: the kernels cannot run on the device with the dtype; the message says why.
        TypeError, ValueError: a shape, or an option of the layer, is not as described.
    """
    checks.integer("repeats", repeats, 1)
    device = torch.device(device)
    choose_backend("triton", device, dtype)
    if device.type == "meta":
        raise RuntimeError("device must be one that the kernels run on; got meta, which has nothing to time")
    for shape in shapes:
        if len(shape) != 4:
            raise ValueError(f"shapes must hold (B, N, d, H); got {shape}")
        for name, number in zip(("B", "N", "d", "H"), shape, strict=True):
            checks.integer(name, number, 1)

    found: dict[Key, Config] = {}
    for batch, length, dim, num_heads in shapes:
        attn = DyDiLAttention(dim, num_heads, device=device, dtype=dtype, backend="triton", **options)
        x = torch.randn(batch, length, dim, device=device, dtype=dtype, requires_grad=training)
        for trial in trials(step_of(attn, x, training), device, repeats):
            if trial.accepted:
                found[trial.key] = trial.tried
            if trial.failure is not None:
                warnings.warn(f"{trial.key[0]}: {trial.tried} was passed over: {trial.failure}", stacklevel=2)
    return found


class Trial(NamedTuple):
    """One configuration ``tried`` for ``key`` in place of ``before``; times of a call in seconds.

    ``seconds`` is None where there is no such kernel, and ``failure`` says why; ``best`` is the least time before;
    ``accepted`` tells whether it was faster by more than noise and stays.
    """

    key: Key
    before: Config
    tried: Config
    seconds: float | None
    best: float
    accepted: bool
    failure: str | None = None


def trials(
    call: Callable[[], object], device: torch.device, repeats: int, stages: Sequence[str] = ()
) -> Iterator[Trial]:
    """Times a call with one configuration after the other, of each stage that it runs, or those of ``stages``.

    The best ones stay in ``TUNED``.
    """
    from dydila_kernels.ops import configs

    best = duration(call, device, repeats)
    for key in asked_by(call):
        if stages and key[0] not in stages:
            continue
        for candidate in alternatives(configs.lookup(key), key[0]):
            tuned, before = configs.TUNED.get(key), configs.lookup(key)
            configs.TUNED[key] = candidate
            seconds, failure = None, None
            try:
                seconds = duration(call, device, repeats)
            except Exception as error:
                if not is_of_compilation(error):
                    raise
                failure = f"{type(error).__name__}: {error}".splitlines()[0]
            accepted = seconds is not None and seconds < GAIN * best
            if not accepted:
                del configs.TUNED[key]
                if tuned is not None:
                    configs.TUNED[key] = tuned
            yield Trial(key, before, candidate, seconds, best, accepted, failure)
            if accepted and seconds is not None:
                best = seconds


def step_of(attn: DyDiLAttention, x: torch.Tensor, training: bool) -> Callable[[], object]:
    """One call of the layer, with its gradients where ``training``."""
    length = x.shape[1]
    side = round(length**0.5)
    grid = (side, side) if side * side == length else (1, length)
    leaves = [x, *(p for p in attn.parameters() if p.requires_grad)]

    def step() -> object:
        with torch.set_grad_enabled(training):
            out = attn(x, HW=grid)
        return torch.autograd.grad(out, leaves, out) if training else out

    return step


def asked_by(call: Callable[[], object]) -> list[tuple[str, str, int]]:
    """The configurations that a call looks up."""
    from dydila_kernels.ops import configs

    configs.asked = {}
    try:
        call()
        return list(configs.asked)
    finally:
        configs.asked = None


def alternatives(config: Config, stage: str = "") -> Iterator[Config]:
    """Configurations that differ from this one in one number, by a factor of two (stages: by one).

    Or in tokens and warps alike, which leaves a thread what it has; of :data:`configs.ROW_STAGES` only so.

    A tile has an element for each thread at least: kernels that write where they read rely on it.
    """
    from dydila_kernels.ops.configs import ROW_STAGES

    for other in neighbours(config):
        if stage in ROW_STAGES:
            if other.block_n != config.block_n and other.block_n == 16 * other.warps and other.warps > 1:
                yield other
        elif other.block_n * other.block_d >= 64 * other.warps:
            yield other


def neighbours(config: Config) -> Iterator[Config]:
    for name in ("block_n", "block_d", "block_k"):
        value = getattr(config, name)
        if value >= 16:  # smaller ones are no dimension of a tile
            yield from (replace(config, **{name: v}, reason="tuned") for v in (value // 2, 2 * value) if v >= 16)
    yield from (replace(config, warps=w, reason="tuned") for w in (config.warps // 2, 2 * config.warps) if 1 <= w <= 16)
    for block_n, warps in ((config.block_n // 2, config.warps // 2), (2 * config.block_n, 2 * config.warps)):
        if block_n >= 16 and 1 <= warps <= 16:
            yield replace(config, block_n=block_n, warps=warps, reason="tuned")
    yield from (replace(config, stages=s, reason="tuned") for s in (config.stages - 1, config.stages + 1) if s >= 1)


def is_of_compilation(error: Exception) -> bool:
    """Whether there is no such kernel for the device: it needs more than there is, or a pass of the compiler fails.

    The latter is a bare RuntimeError, as is much that must not be passed over; hence the look at where it came from.
    """
    from triton.runtime.errors import OutOfResources

    frames = traceback.walk_tb(error.__traceback__)
    compiling = any(
        frame.f_code.co_name == "compile" and frame.f_globals["__name__"] == "triton.compiler.compiler"
        for frame, _ in frames
    )
    return compiling or isinstance(error, OutOfResources)


def duration(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median time of a call in seconds, after two calls that compile and warm up."""
    for _ in range(2):
        call()
    return statistics.median(seconds_of(call, device) for _ in range(repeats))


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Duration of one call: by the CPU's clock, or by events on the current CUDA stream, from an idle device until it
    is idle again.  Where the host launches more slowly than the device computes, that is the time of the host."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3
