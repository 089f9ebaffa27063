"""Keys and shapes, loading a DiT attention, copies, and the fused form."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dydila_kernels import DyDiLAttention
from dydila_kernels.testing import relative_error, with_distinct_factors

D, P, F, L = 8, 3, 4, 5
FACTORS = {"num_projectors": P, "num_kernel_factors": F, "num_differential_factors": L}

SHARED = {"qkv.weight": (3 * D, D), "proj.weight": (D, D), "proj.bias": (D,)}
PROJECTION = {f"projection_{side}.{name}": shape for side in "qk" for name, shape in
              {"weight": (P, D, D), "router": (D, P)}.items()}  # fmt: skip
MEASURE = {"measure.gamma": (F,), "measure.router_q": (D, F), "measure.router_k": (D, F)}
REDUNDANT = {"measure.router_q_redundant": (D, F), "measure.router_k_redundant": (D, F)}
LAMBDA_Q = {"differential.lam": (L,), "differential.router_q": (2 * D, L)}
BRANCHES = {"dwc.branches.3x3": (D, 1, 3, 3), "dwc.branches.1x3": (D, 1, 1, 3), "dwc.branches.3x1": (D, 1, 3, 1)}
DEFAULT = {**SHARED, **PROJECTION, **MEASURE, **REDUNDANT, **LAMBDA_Q, "differential.router_k": (2 * D, L), **BRANCHES}


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}


@pytest.mark.parametrize(
    ("configuration", "expected"),
    [
        ({}, DEFAULT),
        ({"router_gradient": "straight_through", "normalization": "denominator", "num_heads": 2}, DEFAULT),
        ({"qkv_bias": True}, {**DEFAULT, "qkv.bias": (3 * D,)}),
        ({"proj_bias": False}, {name: shape for name, shape in DEFAULT.items() if name != "proj.bias"}),
        ({"differential": "map"}, {n: shape for n, shape in DEFAULT.items() if n != "differential.router_k"}),
        ({"differential": "off"}, {**SHARED, **PROJECTION, **MEASURE, **BRANCHES}),
        ({"differential": "off", "num_projectors": 0, "dwc_branches": ()}, {**SHARED, **MEASURE}),
        ({"dwc_branches": ("1x1", "identity")}, {**{n: s for n, s in DEFAULT.items() if n not in BRANCHES},
                                                 "dwc.branches.1x1": (D, 1, 1, 1)}),
    ],
    ids=str,
)  # fmt: skip
def test_keys_and_shapes(configuration: dict[str, Any], expected: dict[str, tuple[int, ...]]) -> None:
    assert shapes(DyDiLAttention(D, **{**FACTORS, **configuration})) == expected


def test_routers_are_parameters_that_train_when_asked() -> None:
    for router_gradient in ("none", "straight_through"):
        attn = DyDiLAttention(D, router_gradient=router_gradient)
        for name, parameter in attn.named_parameters():
            assert parameter.requires_grad == ("router" not in name or router_gradient == "straight_through"), name


def test_initial_values() -> None:
    attn = DyDiLAttention(256, gamma_init=2.5, lambda_init=-0.1)
    assert attn.differential is not None and attn.projection_q is not None
    assert (attn.measure.gamma == 2.5).all() and (attn.differential.lam == -0.1).all()
    for weight in (attn.qkv.weight, attn.projection_q.weight):
        assert weight.abs().max() <= 1 / 16 and weight.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.05)
    for router in (attn.projection_q.router, attn.measure.router_k, attn.differential.router_q):
        assert router.std().item() == pytest.approx(1 / 16, rel=0.15)


class DiTAttention(nn.Module):
    """The parameters of a timm or DiT attention."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=True)
        self.proj = nn.Linear(dim, dim)


def test_loading_a_dit_attention_tells_what_is_new() -> None:
    trained, attn = DiTAttention(D), DyDiLAttention(D, 2, qkv_bias=True, **FACTORS)
    before = copy.deepcopy(attn.state_dict())
    result = attn.load_state_dict(trained.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) == set(DEFAULT) - set(SHARED)
    x = torch.randn(2, 16, D)
    assert torch.equal(attn.qkv(x), trained.qkv(x)) and torch.equal(attn.proj(x), trained.proj(x))
    assert all(torch.equal(attn.state_dict()[name], before[name]) for name in result.missing_keys)
    attn.qkv.load_state_dict(trained.qkv.state_dict())
    attn.proj.load_state_dict(trained.proj.state_dict())
    with pytest.raises(RuntimeError, match="Missing key") as error:
        attn.load_state_dict(trained.state_dict())
    assert all(name in str(error.value) for name in result.missing_keys)


def test_load_attention_is_strict_and_names_what_is_new() -> None:
    trained, attn = DiTAttention(D), DyDiLAttention(D, 2, qkv_bias=True, **FACTORS)
    assert set(attn.load_attention(trained.state_dict())) == set(DEFAULT) - set(SHARED)
    assert torch.equal(attn.qkv.weight, trained.qkv.weight) and torch.equal(attn.proj.bias, trained.proj.bias)
    with pytest.raises(ValueError, match=r"lacks nothing and has beside them qkv\.bias"):
        DyDiLAttention(D, **FACTORS).load_attention(trained.state_dict())
    with pytest.raises(ValueError, match=r"lacks proj\.weight and has beside them q_norm\.weight"):
        state = {**trained.state_dict(), "q_norm.weight": torch.ones(D)}
        del state["proj.weight"]
        attn.load_attention(state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        attn.load_attention(DiTAttention(2 * D).state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_copies_and_files(fused: bool, tmp_path: Path) -> None:
    """deepcopy, pickle, and torch.save of the state_dict, read with weights_only."""
    attn = with_distinct_factors(DyDiLAttention(D, 2, **FACTORS)).eval()
    if fused:
        attn.fuse()
    x = torch.randn(2, 16, D)
    expected = attn(x)
    torch.save(attn.state_dict(), tmp_path / "state.pt")
    loaded = DyDiLAttention(D, 2, **FACTORS).eval()
    if fused:
        loaded.fuse()
    result = loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert not result.missing_keys and not result.unexpected_keys
    buffer = io.BytesIO()
    torch.save(attn, buffer)
    buffer.seek(0)
    whole = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(attn), pickle.loads(pickle.dumps(attn)), loaded, whole):
        assert torch.equal(other(x), expected) and other.fused == fused
    twin = copy.deepcopy(attn)
    with torch.no_grad():
        twin.measure.gamma.add_(1)
    assert torch.equal(attn(x), expected) and not torch.equal(twin(x), expected)


@pytest.mark.parametrize("fused", [False, True])
def test_safetensors(fused: bool, tmp_path: Path) -> None:
    """No two names share memory, which save_model would drop, and no buffer is left out that a call needs."""
    files = pytest.importorskip("safetensors.torch")
    layers = [DyDiLAttention(D, 2, router_gradient="straight_through", **FACTORS).eval() for _ in range(2)]
    attn, other = (layer.fuse() if fused else layer for layer in layers)
    files.save_model(attn, tmp_path / "attention.safetensors")
    assert files.load_file(tmp_path / "attention.safetensors").keys() == attn.state_dict().keys()
    assert files.load_model(other, tmp_path / "attention.safetensors") == (set(), [])
    x = torch.randn(2, 16, D)
    assert torch.equal(other(x), attn(x))


CONFIGURATIONS: list[dict[str, Any]] = [
    {},
    {"num_heads": 2, "normalization": "denominator", "dwc_branches": ("3x3", "1x3", "3x1", "1x1", "identity")},
    {"differential": "map", "router_gradient": "straight_through", "qkv_bias": True},
    {"differential": "off", "num_projectors": 0, "dwc_branches": ()},
    {"num_prefix_tokens": 2, "dwc_branches": ("1x1", "identity")},
]
fusible = pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)


def fused_pair(configuration: dict[str, Any]) -> tuple[DyDiLAttention, DyDiLAttention, Tensor]:
    attn = with_distinct_factors(DyDiLAttention(D, **{**FACTORS, **configuration}, dtype=torch.float64))
    x = torch.randn(2, 16 + attn.num_prefix_tokens, D, dtype=torch.float64)
    return attn, copy.deepcopy(attn).fuse(), x


@fusible
def test_fuse_changes_no_output(configuration: dict[str, Any]) -> None:
    attn, fused, x = fused_pair(configuration)
    mask = torch.rand(x.shape[:2]) < 0.7
    for under_grad in (True, False):
        with torch.set_grad_enabled(under_grad):
            assert relative_error(fused(x), attn(x)) < 1e-14
            assert relative_error(fused(x, mask), attn(x, mask)) < 1e-14
    x.requires_grad_()
    gradients = [torch.autograd.grad(layer(x).square().sum(), x)[0] for layer in (fused, attn)]
    assert relative_error(*gradients) < 1e-13


@fusible
def test_fuse_twice_is_fuse_once(configuration: dict[str, Any]) -> None:
    _, fused, x = fused_pair(configuration)
    before, keys = fused(x), shapes(fused)
    assert fused.fuse() is fused
    assert torch.equal(fused(x), before) and shapes(fused) == keys


def test_fused_refuses_to_train() -> None:
    attn, fused, x = fused_pair({})
    assert attn.training and not fused.training and fused.eval() is fused
    assert not any(p.requires_grad for p in fused.parameters())
    with pytest.raises(RuntimeError, match="cannot train after fuse"):
        fused.train()
    with pytest.raises(RuntimeError, match="cannot train after fuse"):
        nn.Sequential(fused).train()
    fused.proj.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="cannot train after fuse"):
        fused(x)
    with torch.no_grad():
        assert relative_error(fused(x), attn(x)) < 1e-14


@fusible
def test_fused_loads_fused_and_unfused(configuration: dict[str, Any]) -> None:
    attn, fused, x = fused_pair(configuration)
    for source in (fused, attn):
        state = copy.deepcopy(source.state_dict())
        _, other, _ = fused_pair(configuration)
        other.load_state_dict(source.state_dict())
        assert relative_error(other(x), attn(x)) < 1e-14
        assert source.state_dict().keys() == state.keys()


@fusible
def test_fused_loads_within_a_model(configuration: dict[str, Any]) -> None:
    attn, fused, x = fused_pair(configuration)
    for source in (fused, attn):
        _, other, _ = fused_pair(configuration)
        nn.Sequential(nn.Identity(), other).load_state_dict(nn.Sequential(nn.Identity(), source).state_dict())
        assert relative_error(other(x), attn(x)) < 1e-14


def test_unfused_refuses_a_fused_state() -> None:
    attn, fused, _ = fused_pair({})
    with pytest.raises(RuntimeError, match=r"dwc\.weight.*saved after fuse\(\): call fuse\(\)"):
        attn.load_state_dict(fused.state_dict())


def test_fused_kernel_is_the_sum_of_the_branches() -> None:
    attn = DyDiLAttention(D, dwc_branches=("3x3", "1x3", "3x1", "1x1", "identity"))
    assert attn.dwc is not None
    weight, bias = attn.dwc.fused_weight()
    expected = attn.dwc.branches["3x3"].detach().clone()
    expected[:, :, 1:2] += attn.dwc.branches["1x3"]
    expected[:, :, :, 1:2] += attn.dwc.branches["3x1"]
    expected[:, :, 1:2, 1:2] += attn.dwc.branches["1x1"] + 1
    assert bias is None and weight.shape == (D, 1, 3, 3) and torch.allclose(weight, expected, atol=1e-7)


def test_fused_layer_moves_and_casts() -> None:
    attn, fused, x = fused_pair({})
    assert relative_error(fused.float()(x.float()), attn(x)) < 1e-5
    assert fused.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
