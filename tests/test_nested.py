"""A layer called within the call of another one, after a failed call, and under a default device."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dydila_kernels import DyDiLAttention
from dydila_kernels.testing import assert_agree
from dydila_kernels.torch_backend import blocks
from tests.layers import SUB_MODULES, CallsAnother, both_ways, gradients_of, layer_of


@pytest.fixture
def nested(block_of: Callable[[int], None]) -> tuple[DyDiLAttention, Tensor, Callable[..., object]]:
    """A layer that takes several blocks, and a call of another one of the same size."""
    block_of(64)
    attn, x = layer_of()
    inner, z = layer_of()

    def call(training: bool = True) -> None:
        with torch.no_grad():
            inner(z)
        if training:
            with torch.enable_grad():
                gradients_of(inner, z)

    return attn, x, call


@pytest.mark.parametrize("every", [3, 7, 20])
def test_a_dispatch_mode_may_call_another_layer(
    nested: tuple[DyDiLAttention, Tensor, Callable[..., object]], every: int
) -> None:
    attn, x, call = nested
    expected, plain = gradients_of(attn, x), both_ways(attn, x)
    with CallsAnother(lambda: call(training=False), every):  # below a mode nothing is recorded
        assert_agree(gradients_of(attn, x), expected, 0)
        with torch.no_grad():
            assert_agree({"y": attn(x)}, {"y": plain}, 1e-11)
    assert_agree(gradients_of(attn, x), expected, 0)


def test_a_hook_may_call_another_layer(nested: tuple[DyDiLAttention, Tensor, Callable[..., object]]) -> None:
    attn, x, call = nested
    expected = gradients_of(attn, x)
    for name in SUB_MODULES:
        getattr(attn, name).register_forward_pre_hook(lambda *_: call())
        getattr(attn, name).register_full_backward_hook(lambda *_: call())
    assert_agree(gradients_of(attn, x), expected, 1e-12)


def test_a_tensor_hook_may_call_another_layer(nested: tuple[DyDiLAttention, Tensor, Callable[..., object]]) -> None:
    attn, x, call = nested
    expected = gradients_of(attn, x)
    for parameter in attn.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda grad: call())
    assert_agree(gradients_of(attn, x), expected, 0)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timer")
def test_a_signal_handler_may_call_another_layer(
    nested: tuple[DyDiLAttention, Tensor, Callable[..., object]],
) -> None:
    attn, x, call = nested
    with torch.no_grad():
        expected = attn(x)
    trained, count = gradients_of(attn, x), 0

    def handler(*_: object) -> None:
        nonlocal count
        count += 1
        call()
        signal.setitimer(signal.ITIMER_REAL, 1e-3)

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 1e-3)
    try:
        while count < 20:
            with torch.no_grad():
                assert torch.equal(attn(x), expected)
            assert_agree(gradients_of(attn, x), trained, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_layer_may_fail_in_the_middle_and_be_called_again(nested: Any) -> None:
    attn, x, _ = nested
    expected = gradients_of(attn, x)

    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    for every in (5, 15, 30):
        with pytest.raises(Stop), CallsAnother(stop, every):
            attn(x)
    assert_agree(gradients_of(attn, x), expected, 0)
    assert len(blocks.idle.stack) <= 2


# Default devices ------------------------------------------------------------------------------------------------------


def in_a_thread(function: Callable[[], None]) -> None:
    """A fresh one, which has no memory kept yet; errors are raised here."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("gradients", [False, True])
def test_default_device(gradients: bool) -> None:
    """The layer's tensors say where it computes, whatever the device of new tensors is."""
    attn, x = layer_of()
    expected = both_ways(attn, x)

    def under_a_context() -> None:
        with torch.set_grad_enabled(gradients):
            with torch.device("meta"):
                assert_agree({"y": attn(x).detach()}, {"y": expected}, 1e-11)
            assert_agree({"y": attn(x).detach()}, {"y": expected}, 1e-11)
            attn.routing(x)

    def under_a_default() -> None:
        torch.set_default_device("meta")
        try:
            with torch.set_grad_enabled(gradients):
                assert_agree({"y": attn(x).detach()}, {"y": expected}, 1e-11)
        finally:
            torch.set_default_device(None)

    in_a_thread(under_a_context)
    in_a_thread(under_a_default)
