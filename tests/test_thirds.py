"""The thirds of the shared projection: their gradients are put together without a copy where they lie side by side."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dydila_kernels.thirds import joined, thirds

D = 4


def parts_of(place: str) -> tuple[Tensor, ...]:
    """Three gradients (2, 3, d), for each place where they may lie."""
    whole = torch.randn(2, 3, 5 * D)
    q, k, v, other, _ = whole.chunk(5, -1)
    return {
        "side by side": (q, k, v),
        "further on": (k, v, other),
        "in another order": (k, q, v),
        "with a gap": (q, k, other),
        "apart": tuple(t.clone() for t in (q, k, v)),
        "one apart": (q, k, v.clone()),
        "in rows of one another": torch.randn(3, 2, 3, D).unbind(),
        "of other strides": (q, k, v.clone().mT.contiguous().mT),
    }[place]


@pytest.mark.parametrize("place", ["side by side", "further on"])
def test_what_lies_joined_is_not_copied(place: str) -> None:
    parts = parts_of(place)
    whole = joined(parts)
    assert whole is not None and whole.data_ptr() == parts[0].data_ptr() and not whole._is_view()
    assert torch.equal(whole, torch.cat(parts, -1))


@pytest.mark.parametrize(
    "place", ["in another order", "with a gap", "apart", "one apart", "in rows of one another", "of other strides"]
)
def test_what_lies_elsewhere_is_copied(place: str) -> None:
    parts = parts_of(place)
    assert joined(parts) is None
    qkv = torch.randn(2, 3, 3 * D, requires_grad=True)
    torch.autograd.backward(thirds(qkv), parts)
    assert torch.equal(qkv.grad, torch.cat(parts, -1))


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (0, 3), (2, 0)])
def test_any_number_of_rows(shape: tuple[int, int]) -> None:
    whole = torch.randn(*shape, 5 * D)
    qkv = torch.randn(*shape, 3 * D, requires_grad=True)
    torch.autograd.backward(thirds(qkv), whole.chunk(5, -1)[:3])
    assert torch.equal(qkv.grad, whole[..., : 3 * D])


def from_one_block(scale: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """A function of three parts whose gradients lie side by side."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, *parts: Tensor) -> Tensor:
            return sum(part.detach() for part in parts)

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> tuple[Tensor, ...]:
            return (scale * torch.cat([grad, 2 * grad, 3 * grad], -1)).chunk(3, -1)

    return Function.apply


@pytest.mark.parametrize("change", ["none", "a hook", "an in-place hook", "used twice", "unused", "retained"])
def test_gradients_that_others_change(change: str) -> None:
    """As of ``chunk``, whatever is done with a part or its gradient on the way."""
    found = []
    for split in (thirds, lambda qkv: qkv.chunk(3, -1)):
        torch.manual_seed(0)
        qkv, grad = torch.randn(2, 3, 3 * D, requires_grad=True), torch.randn(2, 3, D)
        q, k, v = split(qkv)
        if change == "a hook":
            k.register_hook(lambda g: 7 * g)
        elif change == "an in-place hook":
            k.register_hook(lambda g: g.mul_(7))
        elif change == "retained":
            k.retain_grad()
        out = q + v if change == "unused" else from_one_block(torch.tensor(1.0))(q, k, v)
        (out + k.sin() if change == "used twice" else out).backward(grad)
        found.append((qkv.grad, k.grad if change == "retained" else None))
    (ours, kept), (expected, also) = found
    assert torch.equal(ours, expected)
    assert kept is None or torch.equal(kept, also)


def test_second_derivatives_and_transforms() -> None:
    qkv = torch.randn(1, 2, 3 * D, dtype=torch.float64, requires_grad=True)

    def product(t: Tensor) -> Tensor:
        q, k, v = thirds(t)
        return q * k * v

    assert torch.autograd.gradgradcheck(product, qkv)
    expected = torch.func.jacrev(lambda t: torch.stack([*t.chunk(3, -1)]).prod(0))(qkv.detach())
    assert torch.allclose(torch.func.jacrev(product)(qkv.detach()), expected)
    assert torch.allclose(torch.func.jacfwd(product)(qkv.detach()), expected)


def test_thirds_of_one_call() -> None:
    are_thirds = pytest.importorskip("dydila_kernels.ops.autograd").are_thirds
    qkv, other = (torch.randn(1, 2, 3 * D, requires_grad=True) for _ in range(2))
    (q, k, v), (_, _, w) = thirds(qkv), thirds(other)
    assert are_thirds(q, k, v)
    assert not are_thirds(q, k, w) and not are_thirds(q, k, v.clone()) and not are_thirds(*qkv.chunk(3, -1))
    assert not are_thirds(*(t.detach() for t in (q, k, v)))


def test_a_part_without_a_gradient_gets_zeros() -> None:
    qkv = torch.randn(1, 2, 3 * D, requires_grad=True)
    q, k, _ = thirds(qkv)
    torch.autograd.backward([k], [torch.ones_like(q)])
    assert torch.equal(qkv.grad, torch.cat([torch.zeros_like(q), torch.ones_like(q), torch.zeros_like(q)], -1))
