"""Norms of queries and keys: the equations, the names and weights of others, and every way to run the layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tests.interpreter as interpreter  # before the package, which may import Triton
from dydila_kernels import DyDiLAttention, dydila_attention
from dydila_kernels.norms import ACROSS, NORMS
from dydila_kernels.testing import assert_agree, call_layer, layer_inputs, output_and_gradients, relative_error
from dydila_kernels.torch_backend import blocks
from tests.battery import (
    assert_gradcheck,
    assert_is_its_equations,
    assert_keeps_the_2x_rule,
    assert_packed_is_one_by_one,
    assert_transforms,
    compilations,
    spread,
)
from tests.ranks import on_ranks

KINDS = [(kind, across) for kind in NORMS for across in ACROSS]
EVERY_KIND = pytest.mark.parametrize(("kind", "across"), KINDS)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"normalization": "denominator", "router_gradient": "straight_through", "num_prefix_tokens": 2},
    {"differential": "map", "qkv_bias": True},
    {"differential": "off"},
    {"differential": "off", "num_projectors": 0, "dwc_branches": (), "normalization": "none"},
]


def layer(kind: str = "rms", across: str = "head", dim: int = 8, heads: int = 2, **options: Any) -> DyDiLAttention:
    options = {"dtype": torch.float64, **options}
    return spread(DyDiLAttention(dim, heads, qk_norm=kind, qk_norm_across=across, **options))


def tokens(attn: DyDiLAttention, batch: int = 2, length: int = 9) -> Tensor:
    return torch.randn(batch, length + attn.num_prefix_tokens, attn.dim, dtype=attn.proj.weight.dtype)


@EVERY_KIND
def test_is_the_norm_written_out(kind: str, across: str) -> None:
    """Every one of Q, K, Q' and K', with the mean and the mean square of a head or of a token."""
    attn = layer(kind, across, 12, 3, qk_norm_eps=1e-2, dwc_branches=())
    x = tokens(attn)

    def norm(t: Tensor, module: nn.Module) -> Tensor:
        parts = t.reshape(2, 9, 3 if across == "head" else 1, -1)
        if kind == "layer":
            parts = parts - parts.mean(-1, keepdim=True)
        parts = parts / (parts.square().mean(-1, keepdim=True) + 1e-2).sqrt() * module.weight
        return (parts + module.bias if kind == "layer" else parts).reshape(t.shape)

    q, k, v = attn.qkv(x).chunk(3, -1)
    q, redundant_q = norm(q, attn.q_norm), norm(attn.projection_q(x), attn.q_norm)
    k, redundant_k = norm(k, attn.k_norm), norm(attn.projection_k(x), attn.k_norm)
    gamma, kernel_routers = attn.measure()
    lam, differential_routers = attn.differential()
    routers = {"kernel_routers": kernel_routers, "differential_routers": differential_routers}
    out = dydila_attention(q, k, v, redundant_q, redundant_k, gamma=gamma, lam=lam, num_heads=3, **routers)
    assert relative_error(attn(x), attn.proj(out)) < 1e-12


@EVERY_KIND
@pytest.mark.parametrize("elements", [2**19, 40])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(
    options: dict[str, Any], elements: int, kind: str, across: str, block_of: Callable[[int], None]
) -> None:
    block_of(elements)
    attn = layer(kind, across, **options)
    assert_is_its_equations(attn, tokens(attn))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@EVERY_KIND
def test_2x_rule(kind: str, across: str, dtype: torch.dtype) -> None:
    assert_keeps_the_2x_rule(dtype, (2, 36, 24), {"num_heads": 3, "qk_norm": kind, "qk_norm_across": across})


@EVERY_KIND
def test_gradcheck(kind: str, across: str) -> None:
    attn = layer(kind, across, 4, num_kernel_factors=1, num_differential_factors=1)
    norms = [name for name, _ in attn.named_parameters() if "norm" in name]
    assert len(norms) == (2 if kind == "rms" else 4)
    assert_gradcheck(attn, tokens(attn, 1, 4), [*norms, "qkv.weight", "projection_q.weight"])


@EVERY_KIND
def test_transforms(kind: str, across: str) -> None:
    attn = layer(kind, across, router_gradient="straight_through")
    assert_transforms(attn, tokens(attn))


@settings(max_examples=60)
@given(
    st.sampled_from(KINDS), st.sampled_from([(4, 1), (6, 3), (8, 8), (15, 5)]), st.integers(0, 3), st.integers(0, 5),
    st.integers(1, 5), st.sampled_from(["none", "mask", "packed"]), st.sampled_from([30, 200, 2**20]),
    st.sampled_from(OPTIONS), st.integers(0, 2**16),
)  # fmt: skip
def test_of_any_size(
    kind: tuple[str, str], width: tuple[int, int], batch: int, rows: int, columns: int, given: str, elements: int,
    options: dict[str, Any], seed: int,
) -> None:  # fmt: skip
    """Masked and packed tokens, in blocks that cut them anywhere."""
    torch.manual_seed(seed)
    attn = layer(*kind, *width, **options)
    length = rows * columns + attn.num_prefix_tokens
    arguments: dict[str, Any] = {"HW": (rows, columns)}
    if given == "packed":
        batch, arguments = 1, {"HW": [(rows, columns), (1, 2)], "cu_seqlens": [0, length, length + 2]}
        arguments["cu_seqlens"][-1] += attn.num_prefix_tokens
        length = arguments["cu_seqlens"][-1]
    elif given == "mask":
        arguments["mask"] = torch.rand(batch, length) < 0.6
    x = torch.randn(batch, length, attn.dim, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "CPU_BLOCK", elements)
        assert_is_its_equations(attn, x, **arguments)


def test_both_sides_of_the_difference_have_one_scale() -> None:
    """The scale of the shared projection, and that of a projector, change nothing."""
    attn = layer(qk_norm_eps=1e-30, dwc_branches=())
    x = tokens(attn)
    expected = attn(x)
    with torch.no_grad():
        attn.qkv.weight[:16] *= 100
        attn.projection_q.weight *= 0.01
        attn.projection_k.weight *= 7
    assert relative_error(attn(x), expected) < 1e-12


def test_masked_tokens_are_not_seen() -> None:
    attn = layer("layer")
    x, mask = tokens(attn), torch.rand(2, 9) < 0.6
    spoilt = torch.where(mask[..., None], x, torch.nan)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            assert torch.equal(attn(spoilt, mask), attn(x, mask)) and not attn(x, mask)[~mask].any()


def test_packed_images_are_the_images() -> None:
    attn, bounds = layer("layer", "token", num_prefix_tokens=1), [0, 13, 15, 26]
    grids = [(3, 4), (1, 1), (5, 2)]
    assert_packed_is_one_by_one(attn, torch.randn(1, 26, 8, dtype=torch.float64), grids, bounds)


@EVERY_KIND
def test_routing_and_balance_loss_are_of_normed_tokens(kind: str, across: str) -> None:
    attn = layer(kind, across, router_gradient="straight_through")
    x = tokens(attn)
    q = attn.q_norm(attn.qkv(x)[..., :8].unflatten(-1, (2, 4)) if across == "head" else attn.qkv(x)[..., :8])
    logits = q.reshape(2, 9, 8) @ attn.measure.router_q
    assert torch.equal(attn.routing(x).indices["measure_q"], logits.argmax(-1))
    attn.balance_loss(x).backward()
    assert attn.q_norm.weight.grad.abs().sum() > 0


# Names and weights of others ------------------------------------------------------------------------------------------


class TimmAttention(nn.Module):
    """The parameters of timm's attention with ``qk_norm``."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.q_norm, self.k_norm = norm(4), norm(4)


@pytest.mark.parametrize("kind", NORMS)
def test_weights_of_timm_load(kind: str) -> None:
    trained, attn = TimmAttention(NORMS[kind]), DyDiLAttention(8, 2, qkv_bias=True, qk_norm=kind)
    for parameter in trained.parameters():
        nn.init.normal_(parameter)
    new = attn.load_attention(trained.state_dict())
    assert not any("norm" in name for name in new)
    for name, t in trained.state_dict().items():
        assert torch.equal(attn.state_dict()[name], t)
    with pytest.raises(ValueError, match=r"it lacks k_norm\.weight"):
        attn.load_attention({name: t for name, t in trained.state_dict().items() if name != "k_norm.weight"})
    with pytest.raises(RuntimeError, match=r"size mismatch for k_norm"):
        attn.load_attention({**trained.state_dict(), "k_norm.weight": torch.ones(8)})


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("rms_norm", ("rms", "head")),
        ("rms_norm_across_heads", ("rms", "token")),
        ("layer_norm", ("layer", "head")),
        ("layer_norm_across_heads", ("layer", "token")),
    ],
)
def test_weights_of_diffusers_load(theirs: str, ours: tuple[str, str]) -> None:
    attention = pytest.importorskip("diffusers.models.attention_processor").Attention
    trained = attention(8, heads=2, kv_heads=2, dim_head=4, qk_norm=theirs, eps=1e-5)
    attn = layer(*ours, qk_norm_eps=1e-5, dtype=torch.float32)
    with torch.no_grad():
        for parameter in trained.norm_q.parameters():
            nn.init.normal_(parameter)
    attn.q_norm.load_state_dict(trained.norm_q.state_dict())
    x = torch.randn(2, 9, 8)
    parts = x if ours[1] == "token" else x.unflatten(-1, (2, 4))
    assert torch.allclose(attn.q_norm(parts), trained.norm_q(parts), atol=1e-6)


@EVERY_KIND
def test_names_and_shapes(kind: str, across: str) -> None:
    attn, plain = layer(kind, across), DyDiLAttention(8, 2)
    new = {name: tuple(t.shape) for name, t in attn.state_dict().items() if name not in plain.state_dict()}
    names = ["weight"] if kind == "rms" else ["weight", "bias"]
    assert new == {f"{side}_norm.{name}": (4 if across == "head" else 8,) for side in "qk" for name in names}
    assert f"qk_norm='{kind}', qk_norm_across='{across}'" in repr(attn) and "qk_norm" not in repr(plain)
    assert type(attn.q_norm) is NORMS[kind]
    other = layer(kind, across)
    other.load_state_dict(attn.state_dict())
    x = tokens(attn)
    assert torch.equal(other(x), attn(x)) and torch.equal(copy.deepcopy(attn)(x), attn(x))
    fused = DyDiLAttention(8, 2, qk_norm=kind, qk_norm_across=across, dtype=torch.float64).fuse()
    fused.load_state_dict(attn.state_dict())
    assert relative_error(fused(x), attn(x)) < 1e-12


def test_without_norms_nothing_is_new() -> None:
    attn = DyDiLAttention(8)
    assert attn.q_norm is None and attn.k_norm is None and not any("norm" in name for name in attn.state_dict())


# Modules and what is put around them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
@pytest.mark.parametrize("change", ["hook", "replaced", "forward"])
def test_a_changed_norm_is_called_in_every_mode(name: str, change: str) -> None:
    attn = layer()
    x, seen = tokens(attn), []

    class Doubled(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(tuple(x.shape))
            return 2 * super().forward(x)

    norm = getattr(attn, name)
    with torch.no_grad():
        plain = attn(x)
    if change == "hook":
        norm.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)) or 2 * output)
    elif change == "replaced":
        setattr(attn, name, Doubled(4, dtype=torch.float64))
        getattr(attn, name).load_state_dict(norm.state_dict())
    else:
        original = norm.forward
        norm.forward = lambda x: seen.append(tuple(x.shape)) or 2 * original(x)
    found = attn(x)
    assert seen == [(2, 9, 2, 4)] * 2  # the shared tokens, and the redundant ones
    assert relative_error(found, plain) > 1e-2
    with torch.no_grad():
        assert relative_error(attn(x), found) < 1e-12
    assert len(seen) == 4


@EVERY_KIND
def test_any_module_may_take_its_place(kind: str, across: str) -> None:
    attn, plain = layer(kind, across), DyDiLAttention(8, 2, dtype=torch.float64)
    plain.load_state_dict(attn.state_dict(), strict=False)
    attn.q_norm, attn.k_norm = nn.Identity(), nn.Identity()
    x = tokens(attn)
    with torch.no_grad():
        assert relative_error(attn(x), plain(x)) < 1e-12


@EVERY_KIND
def test_autocast_and_a_norm_kept_in_float32(kind: str, across: str) -> None:
    attn = layer(kind, across, dtype=torch.float32)
    x = tokens(attn)
    for context in (torch.enable_grad, torch.no_grad):
        with context(), torch.autocast("cpu", torch.bfloat16):
            out = attn(x)
        assert out.dtype == torch.bfloat16 and relative_error(out, attn(x)) < 0.05
    attn.bfloat16()
    attn.q_norm.float(), attn.k_norm.float()
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            assert attn(x.bfloat16()).dtype == torch.bfloat16
            assert relative_error(attn(x.bfloat16()), out) < 0.05


# Compilers ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "across"), [("rms", "head"), ("layer", "token")])
def test_compiles_at_most_twice(kind: str, across: str) -> None:
    attn = layer(kind, across)
    sizes = [(2, 3, 4), (3, 5, 2), (4, 6, 7)]
    counts = compilations(attn, [(tokens(attn, b, r * c), {"HW": (r, c)}) for b, r, c in sizes])
    assert counts[-1] == counts[1] <= 2, counts


@EVERY_KIND
def test_exports(kind: str, across: str) -> None:
    attn = layer(kind, across)
    x = tokens(attn)
    program = torch.export.export(attn, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    other = tokens(attn, 5)
    assert relative_error(program.module()(other), attn(other)) < 1e-12


@EVERY_KIND
def test_meta_device(kind: str, across: str) -> None:
    attn = layer(kind, across)
    x = tokens(attn)
    empty = DyDiLAttention(8, 2, qk_norm=kind, qk_norm_across=across, device="meta", dtype=torch.float64)
    assert all(p.is_meta for p in empty.parameters()) and empty(x.to("meta")).shape == x.shape
    empty.to_empty(device="cpu").load_state_dict(attn.state_dict())
    assert torch.equal(empty(x), attn(x))


@pytest.mark.skipif(not interpreter.AVAILABLE, reason="Triton is not installed")
@EVERY_KIND
def test_the_kernels_take_normed_tokens(kind: str, across: str) -> None:
    attn = layer(kind, across, 16, dtype=torch.float32, router_gradient="straight_through", backend="triton")
    x = tokens(attn)
    results = []
    for backend in ("triton", "torch"):
        attn.backend = backend
        results.append(output_and_gradients(lambda t: call_layer(attn, t), layer_inputs(attn, x)))
        with torch.no_grad():
            assert relative_error(attn(x), results[-1]["output"]) < 1e-5
    assert_agree(*results, tolerance=2e-5)


# Ranks ----------------------------------------------------------------------------------------------------------------


def spread_over_ranks() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from tests.test_distributed import assert_same

    mesh = init_device_mesh("cpu", (2,))
    for kind, across in KINDS:
        torch.manual_seed(0)
        attn = layer(kind, across, qkv_bias=True, num_prefix_tokens=1)
        assert_same(attn, mesh, (3, 4), [6, 7], masked=across == "head")
    dist.destroy_process_group()


def test_tokens_on_two_ranks() -> None:
    on_ranks(2, spread_over_ranks)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"qk_norm": "group"}, ValueError, r"qk_norm must be one of None, 'rms', 'layer'; got 'group'"),
        ({"qk_norm": True}, ValueError, r"qk_norm must be one of None, 'rms', 'layer'; got True"),
        ({"qk_norm": "rms", "qk_norm_across": "heads"}, ValueError, r"qk_norm_across must be one of 'head', 'token'"),
        ({"qk_norm": "rms", "qk_norm_eps": 0.0}, ValueError, r"qk_norm_eps must be a finite number greater than 0"),
        ({"qk_norm": "rms", "qk_norm_eps": None}, TypeError, r"qk_norm_eps must be a number; got NoneType"),
    ],
)
def test_errors(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        DyDiLAttention(8, **options)
