"""The reference against the paper's equations, written once more as loops over tokens and channels of NumPy numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from dydila_kernels import reference
from dydila_kernels.testing import core_inputs, relative_error

Array = np.ndarray[Any, np.dtype[np.float64]]


def argmax(logits: list[float]) -> int:
    best = 0
    for i, logit in enumerate(logits):
        if logit > logits[best]:
            best = i
    return best


def route(token: Array, router: Array) -> int:
    """Eqs. 1, 6 and 7 for one token."""
    return argmax([sum(token[c] * router[c, f] for c in range(len(token))) for f in range(router.shape[1])])


def phi(token: Array, gamma: float) -> Array:
    """Eq. 5 for one token, as printed; a token without a positive entry gives zeros."""
    r = [max(z, 0.0) for z in token]
    powers = [z**gamma if z > 0 else 0.0 for z in r]
    if not any(r):
        return np.zeros(len(token))
    norm, power_norm = math.hypot(*r), math.hypot(*powers)
    return np.array([p / power_norm * norm for p in powers])


def attend(q: Array, k: Array, v: Array, num_heads: int, normalization: str, q_mass: Array, k_mass: Array) -> Array:
    """sum_j (q_i . k_j) v_j in each head, divided by the normaliser; q, k, v (N, d)."""
    length, dim = q.shape
    out = np.zeros((length, dim))
    for head in np.split(np.arange(dim), num_heads):
        for i in range(length):
            total = sum((float(q[i, head] @ k[j, head]) * v[j, head] for j in range(length)), np.zeros(len(head)))
            if normalization == "length":
                total /= length
            elif normalization == "denominator":
                mass = sum(float(q_mass[i, head] @ k_mass[j, head]) for j in range(length))
                total = total / mass if mass > 0 else np.zeros(len(head))
            out[i, head] = total
    return out


def attention(inputs: dict[str, Array], num_heads: int, normalization: str, differential: str) -> Array:
    """Eqs. 6-8, or 10, for the tokens (N, d) of one image."""
    gamma, kernel_routers = inputs["gamma"], inputs["kernel_routers"]
    names = ("q", "k", "q_redundant", "k_redundant")[: len(kernel_routers)]
    measured = {
        name: np.array([phi(token, gamma[route(token, router)]) for token in inputs[name]])
        for name, router in zip(names, kernel_routers, strict=True)
    }
    q, k, v = measured["q"], measured["k"], inputs["v"]
    if differential == "off":
        return attend(q, k, v, num_heads, normalization, q, k)
    q_redundant, k_redundant, lam = measured["q_redundant"], measured["k_redundant"], inputs["lam"]

    def factors(tokens: Array, redundant: Array, router: Array) -> Array:  # Eq. 7
        pairs = zip(tokens, redundant, strict=True)
        return np.array([[lam[route(np.concatenate(pair), router)]] for pair in pairs])

    lam_q = factors(q, q_redundant, inputs["differential_routers"][0])
    if differential == "map":
        first = attend(q, k, v, num_heads, normalization, q, k)
        return first - lam_q * attend(q_redundant, k_redundant, v, num_heads, normalization, q_redundant, k_redundant)
    lam_k = factors(k, k_redundant, inputs["differential_routers"][1])
    masses = q + abs(lam_q) * q_redundant, k + abs(lam_k) * k_redundant
    return attend(q - lam_q * q_redundant, k - lam_k * k_redundant, v, num_heads, normalization, *masses)


def compare(inputs: dict[str, torch.Tensor], **options: Any) -> None:
    found = reference.dydila_attention(**inputs, **options)
    for b, image in enumerate(found):
        tables = {name: t.numpy() for name, t in inputs.items()}
        one = {name: t[b] if t.ndim == 3 and "router" not in name else t for name, t in tables.items()}
        assert relative_error(image, torch.from_numpy(attention(one, **options))) < 1e-13


@pytest.mark.parametrize("num_heads", [1, 2, 6])
@pytest.mark.parametrize("normalization", ["length", "none", "denominator"])
@pytest.mark.parametrize("differential", ["token", "map", "off"])
def test_attention(num_heads: int, normalization: str, differential: str) -> None:
    inputs = core_inputs(2, 5, 6, differential=differential, gamma=(0.5, 3.0))
    compare(inputs, num_heads=num_heads, normalization=normalization, differential=differential)


@pytest.mark.parametrize("differential", ["token", "map"])
def test_denominator_with_dead_tokens(differential: str) -> None:
    """Zero where a query, or all keys, have no positive entry; not zero where Q is dead and Q' is not."""
    inputs = core_inputs(2, 4, 4, differential=differential)
    inputs["q"][0, :2] = -1
    inputs["q_redundant"][0, 0] = -1
    for name in ("k", "k_redundant"):
        inputs[name][1] = inputs[name][1].abs().neg()
    options = {"num_heads": 2, "normalization": "denominator", "differential": differential}
    compare(inputs, **options)
    out = reference.dydila_attention(**inputs, **options)
    assert not out[0, 0].any() and not out[1].any() and out[0, 1].any()


def test_denominator_bounds_the_output_by_the_largest_value() -> None:
    inputs = core_inputs(3, 7, 8)
    out = reference.dydila_attention(**inputs, normalization="denominator", num_heads=2)
    assert (out.abs().amax(1) <= inputs["v"].abs().amax((1, 2), keepdim=True)[:, 0] * (1 + 1e-12)).all()


def test_denominator_without_difference_is_equation_4() -> None:
    inputs = core_inputs(1, 6, 16)
    inputs["lam"].zero_()
    out = reference.dydila_attention(**inputs, normalization="denominator")
    q, k = (
        reference.power(inputs[name], inputs["gamma"][reference.route(inputs[name], router)])
        for name, router in zip("qk", inputs["kernel_routers"], strict=False)
    )
    similarity = q @ k.mT
    assert relative_error(out, similarity / similarity.sum(-1, keepdim=True) @ inputs["v"]) < 1e-14


@pytest.mark.parametrize("normalization", ["length", "none", "denominator"])
@pytest.mark.parametrize("differential", ["token", "map", "off"])
def test_mask_is_the_shorter_image(normalization: str, differential: str) -> None:
    inputs = core_inputs(2, 6, 4, differential=differential)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
    options: dict[str, Any] = {"normalization": normalization, "differential": differential, "num_heads": 2}
    out = reference.dydila_attention(**inputs, mask=mask, **options)
    assert not out[~mask].any()
    for b in range(2):
        shorter = {
            name: t[b : b + 1, mask[b]] if t.ndim == 3 and "router" not in name else t for name, t in inputs.items()
        }
        assert relative_error(out[b, mask[b]], reference.dydila_attention(**shorter, **options)[0]) < 1e-14


def test_projection() -> None:
    x, weight, router = torch.randn(2, 5, 3).double(), torch.randn(4, 3, 3).double(), torch.randn(3, 4).double()
    found = reference.project(x, weight, reference.route(x, router))
    for b in range(2):
        for i in range(5):
            u = route(x[b, i].numpy(), router.numpy())
            expected = [sum(x[b, i, c] * weight[u, c, out] for c in range(3)) for out in range(3)]
            assert relative_error(found[b, i], torch.stack(expected)) < 1e-15


@pytest.mark.parametrize("bias", [False, True])
def test_depthwise(bias: bool) -> None:
    v, weight = torch.randn(2, 6, 4).double(), torch.randn(4, 1, 3, 3).double()
    offset = torch.randn(4).double() if bias else None
    found = reference.depthwise(v, weight, offset, (2, 3))
    for row in range(2):
        for column in range(3):
            expected = torch.zeros(2, 4).double() if offset is None else offset.expand(2, 4).clone()
            for i in (-1, 0, 1):
                for j in (-1, 0, 1):
                    if 0 <= row + i < 2 and 0 <= column + j < 3:
                        expected += weight[:, 0, 1 + i, 1 + j] * v[:, 3 * (row + i) + column + j]
            assert relative_error(found[:, 3 * row + column], expected) < 1e-15


def test_ties_go_to_the_lowest_index() -> None:
    router = torch.tensor([[0.0, 1.0, 1.0, -1.0], [0.0, 1.0, 1.0, -1.0]])
    tokens = torch.tensor([[1.0, 1.0], [0.0, 0.0], [-1.0, 0.0]])
    assert reference.route(tokens, router).tolist() == [1, 0, 3]
    assert reference.route(torch.tensor([[-1.0, 1.0]]), router).tolist() == [0]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0, 64.0])
def test_power_keeps_the_norm_and_the_scale(scale: float, gamma: float) -> None:
    tokens = torch.randn(5, 7).double()
    factor = torch.full((5,), gamma).double()
    found = reference.power(tokens * scale, factor)
    assert relative_error(found.norm(dim=-1), (tokens * scale).relu().norm(dim=-1)) < 1e-14
    assert relative_error(found / scale, reference.power(tokens, factor)) < 1e-13
    for token, row in zip(tokens, found / scale, strict=True):
        assert relative_error(row, torch.from_numpy(phi(token.numpy(), gamma))) < 1e-13


def test_power_of_a_dead_row_is_zero_with_zero_gradients() -> None:
    tokens = torch.tensor([[-1.0, 0.0, -2.0], [0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    gamma = torch.tensor([0.5, 3.0], dtype=torch.float64, requires_grad=True)
    out = reference.power(tokens, gamma)
    gradients = torch.autograd.grad(out.sum(), [tokens, gamma])
    assert not out.any() and not any(gradient.any() for gradient in gradients)


def test_straight_through_is_exact_forward_and_the_mean_under_the_softmax_backward() -> None:
    table, logits = torch.randn(4).double().requires_grad_(), torch.randn(3, 5, 4).double().requires_grad_()
    index, incoming = logits.argmax(-1), torch.randn(3, 5).double()
    chosen = reference.choose(table, index, logits)
    assert torch.equal(chosen, table[index])
    found = torch.autograd.grad(chosen, [table, logits], incoming)
    (hard,) = torch.autograd.grad(table[index], table, incoming)
    (soft,) = torch.autograd.grad((logits.softmax(-1) * table.detach()).sum(-1), logits, incoming)
    assert relative_error(found[0], hard) < 1e-15 and relative_error(found[1], soft) < 1e-14


def test_straight_through_one_is_one_with_the_gradient_of_the_log_probability() -> None:
    logits = torch.randn(3, 5, 4).double().requires_grad_()
    index, incoming = logits.argmax(-1), torch.randn(3, 5, 1).double()
    one = reference.straight_through_one(logits, index)
    assert torch.equal(one, torch.ones(3, 5, 1).double())
    (found,) = torch.autograd.grad(one, logits, incoming)
    (expected,) = torch.autograd.grad(logits.log_softmax(-1).gather(-1, index[..., None]), logits, incoming)
    assert relative_error(found, expected) < 1e-14
