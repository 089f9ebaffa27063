"""In a transformer block: training under autocast, checkpointing, torch.func, forward-mode AD, double backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dydila_kernels import DyDiLAttention, dydila_attention, reference
from dydila_kernels.testing import (
    TOKENS,
    Tensors,
    assert_agree,
    away_from_kinks,
    core_inputs,
    equations,
    layer_inputs,
    relative_error,
    with_distinct_factors,
)

KINDS = pytest.mark.parametrize(
    "configuration",
    [
        {"num_heads": 2},
        {"normalization": "denominator", "router_gradient": "straight_through"},
        {"differential": "map", "num_heads": 2},
        {"differential": "off", "normalization": "none"},
    ],
    ids=str,
)


class Block(nn.Module):
    """The pre-norm transformer block of DiT."""

    def __init__(self, dim: int, **configuration: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = DyDiLAttention(dim, **configuration)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def layer_of(configuration: dict[str, Any]) -> tuple[DyDiLAttention, Tensor]:
    attn = with_distinct_factors(DyDiLAttention(8, **configuration, dtype=torch.float64))
    return attn, torch.randn(2, 9, 8, dtype=torch.float64)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router_gradient", ["none", "straight_through"])
def test_a_block_trains(autocast: torch.dtype | None, router_gradient: str) -> None:
    block = Block(32, num_heads=2, router_gradient=router_gradient)
    optimizer = torch.optim.AdamW([p for p in block.parameters() if p.requires_grad], lr=3e-3)
    x, target = torch.randn(4, 64, 32), torch.randn(4, 64, 32)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            out = block(x)
        loss = (out.float() - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in block.named_parameters():
        assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.isfinite().all()), name


@KINDS
def test_checkpoint_gives_the_same_gradients(configuration: dict[str, Any]) -> None:
    attn, x = layer_of(configuration)
    parameters = [p for p in attn.parameters() if p.requires_grad]
    gradients = []
    for call in (attn, lambda x: checkpoint(attn, x, use_reentrant=False)):
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(call(leaf).square().sum(), [leaf, *parameters]))
    assert all(torch.equal(found, expected) for found, expected in zip(*gradients, strict=True))


KEPT = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "recomputed": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "selective": {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, KEPT)},
}


def gradients_with_dropout(attn: DyDiLAttention, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and of the trainable parameters."""
    torch.manual_seed(3)
    leaf, parameters = x.clone().requires_grad_(), [p for p in attn.parameters() if p.requires_grad]
    out = call(leaf)
    attn.zero_grad()
    out.square().sum().backward()
    grads = [t.grad for t in (leaf, *parameters)]
    return [out.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_repeat_the_dropout(kind: str) -> None:
    """The reentrant one runs forward as without gradients, in blocks: equal to rounding; the others to the bit."""
    attn, x = layer_of({"num_heads": 2, "proj_drop": 0.5, "router_gradient": "straight_through"})
    expected = gradients_with_dropout(attn, attn, x)
    found = gradients_with_dropout(attn, lambda t: checkpoint(attn, t, **CHECKPOINTS[kind]), x)
    assert 0.3 < (expected[0] == 0).float().mean() < 0.7
    for f, e in zip(found, expected, strict=True):
        assert relative_error(f, e) < (1e-13 if kind == "reentrant" else 1e-300)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["recomputed", "selective"])
def test_checkpoints_within_a_compiled_function(kind: str) -> None:
    attn, x = layer_of({"num_heads": 2})
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: checkpoint(attn, t, **CHECKPOINTS[kind]), fullgraph=True, backend="aot_eager")
    expected = gradients_with_dropout(attn, attn, x)
    for f, e in zip(gradients_with_dropout(attn, compiled, x), expected, strict=True):
        assert relative_error(f, e) < 1e-12


def test_a_checkpoint_keeps_its_input_alone() -> None:
    attn, x = layer_of({"num_heads": 2})
    known = {p.untyped_storage()._cdata for p in attn.parameters()}
    sizes: dict[str, int] = {}
    for name, call in (("plain", attn), ("checkpoint", lambda t: checkpoint(attn, t, use_reentrant=False))):
        kept: dict[int, int] = {}

        def pack(t: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            return t

        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = call(leaf)
        sizes[name] = sum(size for storage, size in kept.items() if storage not in known)
        assert out.requires_grad
    assert sizes["checkpoint"] <= x.nbytes < 4 * x.nbytes < sizes["plain"], sizes


def test_checkpoint_under_autocast() -> None:
    attn, x = DyDiLAttention(8), torch.randn(2, 9, 8)
    gradients = []
    for call in (attn, lambda x: checkpoint(attn, x, use_reentrant=False)):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = call(leaf)
        gradients.append(torch.autograd.grad(out.float().square().sum(), [leaf, attn.qkv.weight]))
    assert all(torch.equal(found, expected) for found, expected in zip(*gradients, strict=True))


@KINDS
def test_jvp_is_the_transpose_of_the_gradient(configuration: dict[str, Any]) -> None:
    """<u, J t> = <J^T u, t> for tangents of the input and of every trainable parameter."""
    attn, x = layer_of(configuration)
    inputs = layer_inputs(attn, x)
    wanted = ["x", *(name for name, p in attn.named_parameters() if p.requires_grad)]

    def call(tensors: Tensors) -> Tensor:
        state = {**inputs, **tensors}
        return functional_call(attn, {k: t for k, t in state.items() if k != "x"}, (state["x"],))

    tangents = {name: torch.randn_like(inputs[name]) for name in wanted}
    primals = {name: inputs[name] for name in wanted}
    out, tangent = jvp(call, (primals,), (tangents,))
    assert relative_error(out, attn(x)) < 1e-12

    u = torch.randn_like(out)
    leaves = [inputs[name].requires_grad_() for name in wanted]
    gradients = torch.autograd.grad(equations(attn, dict(zip(wanted, leaves, strict=True)) | {
        name: t for name, t in inputs.items() if name not in wanted}), leaves, u)  # fmt: skip
    expected = sum((g * tangents[name]).sum() for name, g in zip(wanted, gradients, strict=True))
    assert isinstance(expected, Tensor) and expected.abs() > 1e-3
    assert relative_error((u * tangent).sum(), expected) < 1e-11


@pytest.mark.parametrize("name", ["q", "k", "v", "q_redundant", "k_redundant", "gamma", "lam"])
def test_jvp_of_the_core_against_finite_differences(name: str) -> None:
    inputs = away_from_kinks(core_inputs(1, 5, 4, seed=3))
    direction, step = torch.randn_like(inputs[name]), 1e-6

    def call(t: Tensor) -> Tensor:
        return dydila_attention(**{**inputs, name: t}, num_heads=2)

    tangent = jvp(call, (inputs[name],), (direction,))[1]
    central = (call(inputs[name] + step * direction) - call(inputs[name] - step * direction)) / (2 * step)
    assert tangent.norm() > 1e-3 and relative_error(tangent, central) < 1e-7


@KINDS
@pytest.mark.parametrize("under_grad", [True, False])
def test_dual_numbers(configuration: dict[str, Any], under_grad: bool) -> None:
    attn, x = layer_of(configuration)
    tangent = torch.randn_like(x)
    primal, expected = jvp(attn, (x,), (tangent,))
    with torch.set_grad_enabled(under_grad), forward_ad.dual_level():
        found = forward_ad.unpack_dual(attn(forward_ad.make_dual(x, tangent)))
    assert found.tangent is not None
    assert relative_error(found.tangent, expected) < 1e-12
    assert relative_error(found.primal, primal) < 1e-12


@pytest.mark.parametrize("name", ["measure.gamma", "differential.lam", "qkv.weight", "dwc.branches.3x3", "proj.bias"])
@pytest.mark.parametrize("under_grad", [True, False])
def test_dual_parameters(name: str, under_grad: bool) -> None:
    """A tangent on one parameter alone is not lost."""
    attn, x = layer_of({})
    state = {name: parameter.detach() for name, parameter in attn.named_parameters()}
    tangent = torch.randn_like(state[name])
    with torch.set_grad_enabled(under_grad), forward_ad.dual_level():
        dual = {**state, name: forward_ad.make_dual(state[name], tangent)}
        found = forward_ad.unpack_dual(functional_call(attn, dual, (x,))).tangent
    step = 1e-6
    ahead, behind = (functional_call(attn, {**state, name: state[name] + s * tangent}, (x,)) for s in (step, -step))
    assert found is not None and relative_error(found, (ahead - behind) / (2 * step)) < 1e-7


@KINDS
def test_vmap_is_a_loop(configuration: dict[str, Any]) -> None:
    attn, _ = layer_of(configuration)
    x = torch.randn(3, 2, 9, 8, dtype=torch.float64)
    assert relative_error(vmap(attn)(x), torch.stack([attn(t) for t in x])) < 1e-12


def test_gradients_per_sample() -> None:
    attn, x = layer_of({"num_heads": 2})
    parameters = {name: p.detach() for name, p in attn.named_parameters()}

    def loss(state: Tensors, t: Tensor) -> Tensor:
        return functional_call(attn, state, (t[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for name, parameter in attn.named_parameters():
        if parameter.requires_grad:
            expected = [torch.autograd.grad(attn(t[None]).square().sum(), parameter)[0] for t in x]
            assert relative_error(found[name], torch.stack(expected)) < 1e-11, name


@KINDS
def test_vjp_and_jacobians(configuration: dict[str, Any]) -> None:
    attn, x = layer_of(configuration)
    x = x[:1, :4]
    u = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(attn(leaf), leaf, u)
    assert relative_error(vjp(attn, x)[1](u)[0], expected) < 1e-12
    forward, backward = jacfwd(attn)(x), jacrev(attn)(x)
    assert relative_error(forward, backward) < 1e-12
    assert relative_error((forward * u[..., None, None, None]).sum((0, 1, 2)), expected) < 1e-12


def test_hessian_is_the_double_backward() -> None:
    attn, x = layer_of({"num_heads": 2})
    x = x[:1, :4]
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(attn(leaf).square().sum(), leaf, create_graph=True)
    direction = torch.randn_like(x)
    (second,) = torch.autograd.grad(first, leaf, direction)
    full = hessian(lambda t: attn(t).square().sum())(x)
    assert relative_error((full * direction).sum((-3, -2, -1)), second) < 1e-11


@pytest.mark.parametrize("normalization", ["length", "none", "denominator"])
@pytest.mark.parametrize("differential", ["token", "map", "off"])
@pytest.mark.parametrize("router_gradient", ["none", "straight_through"])
@pytest.mark.parametrize("elements", [2**19, 24])
def test_double_backward_of_the_core(
    normalization: str, differential: str, router_gradient: str, elements: int, block_of: Callable[[int], None]
) -> None:
    """A gradient penalty, differentiated with respect to every input, as of the reference."""
    block_of(elements)
    options: dict[str, Any] = {
        "num_heads": 2,
        "normalization": normalization,
        "differential": differential,
        "router_gradient": router_gradient,
        "mask": torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]]).bool(),
    }
    inputs = core_inputs(2, 5, 8, differential=differential)

    def penalty(function: Callable[..., Tensor]) -> Tensors:
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        out = function(**leaves, **options)
        first = torch.autograd.grad(
            out.square().sum(), list(leaves.values()), create_graph=True, materialize_grads=True
        )
        total = torch.stack([g.square().sum() for g in first]).sum()
        second = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        return {"penalty": total.detach(), **dict(zip(leaves, second, strict=True))}

    assert_agree(penalty(dydila_attention), penalty(reference.dydila_attention), 1e-11)


@pytest.mark.parametrize("shared", ["same", "dependent"])
def test_double_backward_of_inputs_that_depend_on_each_other(shared: str) -> None:
    """The path from one input to another is not counted twice."""
    tables = {name: t for name, t in core_inputs(2, 5, 8).items() if name not in TOKENS}
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    factors = [1.0] * 5 if shared == "same" else [1.0, 2.0, -1.0, 0.5, -0.5]
    results = []
    for function in (dydila_attention, reference.dydila_attention):
        leaf = x.clone().requires_grad_()
        tokens = [leaf if factor == 1 else leaf * factor for factor in factors]
        out = function(*tokens, **tables)
        (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        results.append((first, *torch.autograd.grad(first.square().sum(), leaf)))
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-11


@KINDS
def test_double_backward_of_the_layer(configuration: dict[str, Any]) -> None:
    attn, x = layer_of(configuration)
    parameters = [p for p in attn.parameters() if p.requires_grad]
    inputs = dict(attn.named_parameters())
    results = []
    for call in (attn, lambda x: equations(attn, {**inputs, "x": x})):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(call(leaf).square().sum(), leaf, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), [leaf, *parameters], materialize_grads=True)
        results.append([first, *second])
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-11
