"""Rotary embeddings after the kernel: the equations, relative positions, SANA-Video's own, every way to run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dydila_kernels import DyDiLAttention, dydila_attention, reference
from dydila_kernels.checks import DIFFERENTIALS, NORMALIZATIONS, PAIRINGS
from dydila_kernels.testing import (
    Tensors,
    assert_agree,
    away_from_kinks,
    call_layer,
    core_inputs,
    equations,
    layer_inputs,
    output_and_gradients,
    relative_error,
)
from dydila_kernels.torch_backend import blocks
from tests.battery import assert_is_its_equations, assert_keeps_the_2x_rule, assert_transforms, compilations, spread
from tests.ranks import on_ranks

EVERY_PAIRING = pytest.mark.parametrize("pairing", PAIRINGS)
EVERY_CORE = pytest.mark.parametrize(
    ("normalization", "differential"), [(n, d) for n in NORMALIZATIONS for d in DIFFERENTIALS]
)
OPTIONS: list[dict[str, Any]] = [
    {"num_heads": 2, "num_prefix_tokens": 1, "qk_norm": "rms"},
    {"normalization": "denominator", "router_gradient": "straight_through", "num_heads": 4},
    {"differential": "map", "qkv_bias": True},
    {"differential": "off", "num_projectors": 0, "normalization": "none", "dwc_branches": ()},
]


def layer(dim: int = 8, **options: Any) -> DyDiLAttention:
    return spread(DyDiLAttention(dim, **{"dtype": torch.float64, **options}))


def tables(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """cos and sin of random angles for each channel, those of a pair not even the same."""
    angles = 3 * torch.randn(shape, dtype=torch.float64)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def angles_of(rows: Tensor, columns: Tensor, channels: int) -> Tensor:
    """Angles (N, channels / 2), the first half of them of the row of a token, the second of its column."""
    speeds = torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64)[: channels // 4]
    return torch.cat([rows[:, None] * speeds, columns[:, None] * speeds], -1)


def of_grid(shape: tuple[int, int], offset: tuple[float, float], channels: int, pairing: str) -> tuple[Tensor, Tensor]:
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")
    angles = angles_of(rows.flatten() + offset[0], columns.flatten() + offset[1], channels)
    angles = torch.cat([angles, angles], -1) if pairing == "halves" else angles.repeat_interleave(2, -1)
    return angles.cos(), angles.sin()


@EVERY_PAIRING
def test_rotation_is_a_product_of_complex_numbers(pairing: str) -> None:
    tokens, angles = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 5, 2, dtype=torch.float64)
    heads = tokens.view(2, 5, 3, 4)
    pairs = heads.unflatten(-1, (2, 2)) if pairing == "interleaved" else heads.unflatten(-1, (2, 2)).mT
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, :, None]
    pairs = torch.view_as_real(turned)
    expected = (pairs if pairing == "interleaved" else pairs.mT).reshape(2, 5, 12)
    doubled = angles.repeat_interleave(2, -1) if pairing == "interleaved" else torch.cat([angles, angles], -1)
    found = reference.rotate(tokens, doubled.cos(), doubled.sin(), pairing, 3)
    assert relative_error(found, expected) < 1e-14
    assert relative_error(found.norm(dim=-1), tokens.norm(dim=-1)) < 1e-14


@EVERY_PAIRING
@EVERY_CORE
def test_is_attention_with_rotated_tokens(normalization: str, differential: str, pairing: str) -> None:
    """Written out with matrices of N x N; the denominator is that of tokens that are not rotated."""
    inputs, (cos, sin) = core_inputs(2, 7, 8, differential=differential), tables(7, 4)
    t = {name: value for name, value in inputs.items() if value is not None}

    def measure(name: str, number: int) -> Tensor:
        return reference.power(t[name], t["gamma"][reference.route(t[name], t["kernel_routers"][number])])

    def attend(q: Tensor, k: Tensor, q_mass: Tensor, k_mass: Tensor) -> Tensor:
        out = []
        turned = [reference.rotate(z, cos, sin, pairing, 2) for z in (q, k)]
        for h in (slice(0, 4), slice(4, 8)):
            scores = turned[0][..., h] @ turned[1][..., h].mT
            mass = (q_mass[..., h] @ k_mass[..., h].mT).sum(-1, keepdim=True)
            mass = mass.where(mass > 0, 1)  # of a head without a positive entry, whose scores are zero
            divisor = {"length": 7, "none": 1, "denominator": mass}[normalization]
            out.append(scores @ t["v"][..., h] / divisor)
        return torch.cat(out, -1)

    qt, kt = measure("q", 0), measure("k", 1)
    if differential == "off":
        expected = attend(qt, kt, qt, kt)
    else:
        qr, kr = measure("q_redundant", 2), measure("k_redundant", 3)
        pair = torch.cat([qt, qr], -1), torch.cat([kt, kr], -1)
        lam = [
            t["lam"][reference.route(z, r)][..., None] for z, r in zip(pair, t["differential_routers"], strict=False)
        ]
        if differential == "map":
            expected = attend(qt, kt, qt, kt) - lam[0] * attend(qr, kr, qr, kr)
        else:
            hats = qt - lam[0] * qr, kt - lam[1] * kr
            expected = attend(*hats, qt + lam[0].abs() * qr, kt + lam[1].abs() * kr)
    options = {"num_heads": 2, "normalization": normalization, "differential": differential}
    for function in (reference.dydila_attention, dydila_attention):
        found = function(**inputs, **options, rotary=(cos, sin), rotary_pairing=pairing)
        assert relative_error(found, expected) < 1e-12
    assert relative_error(dydila_attention(**inputs, **options), expected) > 1e-2


@pytest.mark.parametrize("normalization", ["length", "denominator"])
@EVERY_PAIRING
def test_only_relative_positions_count(pairing: str, normalization: str) -> None:
    """A grid that is shifted as a whole gives the same; tokens that change places do not."""
    attn = layer(32, num_heads=2, normalization=normalization, dwc_branches=())
    x = torch.randn(2, 20, 32, dtype=torch.float64)

    def at(*offset: float) -> Tensor:
        return attn(x, HW=(4, 5), rotary=of_grid((4, 5), offset, 16, pairing), rotary_pairing=pairing)

    expected = at(0, 0)
    for offset in ((3, 0), (0, -7), (2.5, 11)):
        assert relative_error(at(*offset), expected) < 1e-11
    assert relative_error(attn(x, HW=(4, 5)), expected) > 1e-2
    cos, sin = of_grid((4, 5), (0, 0), 16, pairing)
    assert relative_error(attn(x, rotary=(cos.flip(0), sin.flip(0)), rotary_pairing=pairing), expected) > 1e-2


def test_angles_of_zero_change_nothing() -> None:
    attn, x = layer(num_heads=2), torch.randn(2, 9, 8, dtype=torch.float64)
    ones, zeros = torch.ones(9, 4), torch.zeros(9, 4)
    for pairing in PAIRINGS:
        assert relative_error(attn(x, rotary=(ones, zeros), rotary_pairing=pairing), attn(x)) < 1e-14


@EVERY_PAIRING
def test_complex_tables_are_cos_and_sin(pairing: str) -> None:
    attn, x = layer(num_heads=2), torch.randn(2, 9, 8, dtype=torch.float64)
    for shape in ((9, 2), (2, 9, 2), (1, 9, 2)):
        angles = torch.randn(shape, dtype=torch.float64)
        whole = torch.cat([angles, angles], -1) if pairing == "halves" else angles.repeat_interleave(2, -1)
        found = attn(x, rotary=torch.polar(torch.ones_like(angles), angles), rotary_pairing=pairing)
        assert torch.equal(found, attn(x, rotary=(whole.cos(), whole.sin()), rotary_pairing=pairing))
        conjugate = torch.polar(torch.ones_like(angles), -angles).conj()
        assert torch.equal(attn(x, rotary=conjugate, rotary_pairing=pairing), found)


def test_is_the_attention_of_sana_video() -> None:
    """diffusers' own, whose denominator adds 1e-15, with its tables and its norms."""
    pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import Attention
    from diffusers.models.transformers import transformer_sana_video as sana

    theirs = Attention(
        24, heads=2, dim_head=12, kv_heads=2, qk_norm="rms_norm_across_heads", bias=False,
        processor=sana.SanaLinearAttnProcessor3_0(),
    ).double()  # fmt: skip
    attn = DyDiLAttention(
        24, 2, differential="off", num_projectors=0, num_kernel_factors=1, gamma_init=1.0, dwc_branches=(),
        normalization="denominator", qk_norm="rms", qk_norm_across="token", qk_norm_eps=1e-5, dtype=torch.float64,
    )  # fmt: skip
    with torch.no_grad():
        for norm in (theirs.norm_q, theirs.norm_k):
            torch.nn.init.normal_(norm.weight, mean=1, std=0.3)
        attn.qkv.weight.copy_(torch.cat([theirs.to_q.weight, theirs.to_k.weight, theirs.to_v.weight]))
    attn.proj.load_state_dict(theirs.to_out[0].state_dict())
    attn.q_norm.load_state_dict(theirs.norm_q.state_dict())
    attn.k_norm.load_state_dict(theirs.norm_k.state_dict())
    embed = sana.WanRotaryPosEmbed(12, (1, 1, 1), 32)
    rotary = embed(torch.empty(2, 24, 2, 3, 4))
    x = torch.randn(2, 24, 24, dtype=torch.float64)
    found = attn(x, HW=(2, 3, 4), rotary=[t.squeeze(2) for t in rotary])
    assert relative_error(found, theirs(x, rotary_emb=rotary)) < 1e-7  # their sums are float32


# Every way to run them ------------------------------------------------------------------------------------------------


@EVERY_PAIRING
@pytest.mark.parametrize("elements", [2**19, 40])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(options: dict[str, Any], elements: int, pairing: str, block_of: Callable[[int], None]) -> None:
    block_of(elements)
    attn = layer(**options)
    x = torch.randn(2, 9 + attn.num_prefix_tokens, 8, dtype=torch.float64)
    for shape in (x.shape[:2], x.shape[1:2]):
        rotary = tables(*shape, 8 // attn.num_heads)
        assert_is_its_equations(attn, x, rotary=rotary, rotary_pairing=pairing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalization", ["length", "denominator"])
def test_2x_rule(normalization: str, dtype: torch.dtype) -> None:
    configuration = {"num_heads": 3, "normalization": normalization}
    rotary = of_grid((6, 6), (0, 0), 8, "interleaved")
    assert_keeps_the_2x_rule(
        dtype, (2, 36, 24), configuration, arguments=lambda: {"rotary": tuple(t.to(dtype) for t in rotary)}
    )


@EVERY_PAIRING
@EVERY_CORE
def test_gradcheck(normalization: str, differential: str, pairing: str, block_of: Callable[[int], None]) -> None:
    """Of the tables too; the second derivatives with them."""
    block_of(8)
    inputs = away_from_kinks(core_inputs(1, 4, 4, differential=differential, seed=3))
    names = [name for name in inputs if "routers" not in name]
    leaves = [inputs[name].requires_grad_() for name in names] + [t.requires_grad_() for t in tables(4, 2)]
    options = {"normalization": normalization, "differential": differential, "num_heads": 2, "rotary_pairing": pairing}

    def call(*tensors: Tensor) -> Tensor:
        given = {**inputs, **dict(zip(names, tensors[:-2], strict=True))}
        return dydila_attention(**given, **options, rotary=tensors[-2:])

    assert gradcheck(call, leaves)
    if normalization == "length":
        assert gradgradcheck(call, leaves)


@EVERY_PAIRING
def test_transforms(pairing: str) -> None:
    attn, x = layer(num_heads=2), torch.randn(2, 9, 8, dtype=torch.float64)
    assert_transforms(attn, x, rotary=tables(9, 4), rotary_pairing=pairing)
    assert_transforms(attn, x, rotary=tables(2, 9, 4), rotary_pairing=pairing)


@settings(max_examples=80)
@given(
    st.sampled_from([(4, 1), (6, 3), (8, 2), (12, 2)]), st.integers(0, 3), st.integers(0, 12),
    st.sampled_from(PAIRINGS),
    st.sampled_from(["batch", "mask", "packed"]), st.booleans(), st.sampled_from([8, 60, 2**20]),
    st.sampled_from(DIFFERENTIALS), st.sampled_from(NORMALIZATIONS), st.integers(0, 2**16),
)  # fmt: skip
def test_of_any_size(
    width: tuple[int, int], batch: int, length: int, pairing: str, kind: str, shared: bool, elements: int,
    differential: str, normalization: str, seed: int,
) -> None:  # fmt: skip
    """The core and its gradients, those of the tables included, in blocks that cut images anywhere."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"num_heads": width[1], "differential": differential, "normalization": normalization}
    options["rotary_pairing"] = pairing
    if kind == "packed":
        batch, options["cu_seqlens"] = 1, [0, length // 3, length]
    elif kind == "mask":
        options["mask"] = torch.rand(batch, length) < 0.6
    inputs = core_inputs(batch, length, width[0], differential=differential, seed=seed)
    shape = (length, width[0] // width[1]) if shared else (batch, length, width[0] // width[1])
    inputs |= dict(zip(("cos", "sin"), tables(*shape), strict=True))

    def call(function: Callable[..., Tensor]) -> Tensors:
        def of(t: Tensors) -> Tensor:
            rest = {name: value for name, value in t.items() if name not in ("cos", "sin")}
            return function(**rest, rotary=(t["cos"], t["sin"]), **options)

        return output_and_gradients(of, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "CPU_BLOCK", elements)
        found = call(dydila_attention)
        again = call(dydila_attention)
    assert all(torch.equal(t, again[name]) for name, t in found.items())
    expected = call(reference.dydila_attention)
    largest = max((t.norm().item() for t in expected.values()), default=0.0)
    for name, t in found.items():
        assert t.shape == expected[name].shape
        assert (t - expected[name]).norm() <= 1e-11 * (expected[name].norm() + 1e-3 * largest), name


def test_packed_images_have_their_own_rows() -> None:
    attn, bounds, grids = layer(num_heads=2), [0, 12, 13, 23], [(3, 4), (1, 1), (5, 2)]
    x, (cos, sin) = torch.randn(1, 23, 8, dtype=torch.float64), tables(23, 4)
    packed = attn(x, HW=grids, cu_seqlens=bounds, rotary=(cos, sin))
    images = [
        attn(x[:, a:b], HW=grid, rotary=(cos[a:b], sin[a:b]))
        for a, b, grid in zip(bounds[:-1], bounds[1:], grids, strict=True)
    ]
    assert relative_error(packed, torch.cat(images, 1)) < 1e-12
    with torch.no_grad():
        assert relative_error(attn(x, HW=grids, cu_seqlens=bounds, rotary=(cos, sin)), packed) < 1e-12


def test_hidden_tokens_and_their_tables_are_not_seen() -> None:
    attn, mask = layer(num_heads=2), torch.rand(2, 9) < 0.6
    x, rotary = torch.randn(2, 9, 8, dtype=torch.float64), tables(2, 9, 4)
    spoilt = [torch.where(mask[..., None], t, torch.nan) for t in (x, *rotary)]
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            assert torch.equal(attn(spoilt[0], mask, rotary=spoilt[1:]), attn(x, mask, rotary=rotary))
    found = torch.compile(attn, backend="eager")(spoilt[0], mask, rotary=spoilt[1:])
    assert relative_error(found, attn(x, mask, rotary=rotary)) < 1e-12


def test_tables_of_another_dtype_and_autocast() -> None:
    attn, x = layer(num_heads=2, dtype=torch.float32), torch.randn(2, 9, 8)
    rotary = tables(9, 4)
    expected = attn(x, rotary=rotary)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        out = attn(x, rotary=rotary)
    assert out.dtype == torch.bfloat16 and relative_error(out, expected) < 0.05
    half = attn.bfloat16()(x.bfloat16(), rotary=rotary)
    assert half.dtype == torch.bfloat16 and relative_error(half, expected) < 0.05


@pytest.mark.slow
def test_compiles_at_most_twice() -> None:
    attn = layer(num_heads=2)
    calls = []
    for batch, rows, columns in ((2, 3, 4), (3, 5, 2), (4, 6, 7)):
        x = torch.randn(batch, rows * columns, 8, dtype=torch.float64)
        calls.append((x, {"HW": (rows, columns), "rotary": tables(rows * columns, 4)}))
    counts = compilations(attn, calls)
    assert counts[-1] == counts[1] <= 2, counts


def test_exports_and_meta_device() -> None:
    attn, x = layer(num_heads=2), torch.randn(2, 9, 8, dtype=torch.float64)
    program = torch.export.export(attn, (x,), {"rotary": tables(9, 4)})
    rotary = tables(9, 4)
    assert relative_error(program.module()(x, rotary=rotary), attn(x, rotary=rotary)) < 1e-12
    empty = DyDiLAttention(8, 2, device="meta")
    on_meta = tuple(t.to("meta") for t in rotary)
    assert empty(torch.empty(2, 9, 8, device="meta"), rotary=on_meta).shape == (2, 9, 8)


def test_learned_tables_get_their_gradient() -> None:
    """Through the layer, with tables shared by a batch and their angles learned."""
    attn, x = layer(num_heads=2), torch.randn(2, 9, 8, dtype=torch.float64)
    inputs = {**layer_inputs(attn, x), "angles": torch.randn(9, 4, dtype=torch.float64)}
    results = []
    for function in (call_layer, equations):

        def of(t: Tensors, function: Any = function) -> Tensor:
            rest = {name: value for name, value in t.items() if name != "angles"}
            return function(attn, rest, rotary=(t["angles"].cos(), t["angles"].sin()))

        results.append(output_and_gradients(of, inputs, ["x", "angles"]))
    assert_agree(*results, tolerance=1e-11)
    assert results[0]["angles"].norm() > 1e-3


# Ranks ----------------------------------------------------------------------------------------------------------------


def spread_over_ranks(backend: str = "torch") -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from dydila_kernels.distributed import sequence_parallel, shard_tokens
    from tests.ranks import gradients

    mesh, dtype = init_device_mesh("cpu", (2,)), torch.float64 if backend == "torch" else torch.float32
    close = {"rtol": 1e-9, "atol": 1e-10} if backend == "torch" else {"rtol": 1e-4, "atol": 1e-5}
    for HW, lengths in (((3, 4), [5, 7]), ((3, 4), [0, 12]), ((2, 3, 2), [7, 5])):
        torch.manual_seed(0)
        normalization = "denominator" if lengths[0] else "length"
        attn = layer(num_heads=2, normalization=normalization, backend=backend, dtype=dtype)
        x, rotary = torch.randn(2, 12, 8, dtype=dtype), tables(2, 12, 4)
        attn(x, HW=HW, rotary=rotary).square().sum().backward()
        expected, whole = gradients(attn), attn(x, HW=HW, rotary=rotary)
        attn.zero_grad()
        parallel = sequence_parallel(attn, mesh)
        mine = [shard_tokens(t, mesh, lengths=lengths) for t in (x, *rotary)]
        out = parallel(mine[0], HW=HW, rotary=mine[1:])
        torch.testing.assert_close(out, shard_tokens(whole, mesh, lengths=lengths), **close)
        out.square().sum().backward()
        for name, share in gradients(parallel).items():
            dist.all_reduce(share, group=mesh.get_group())
            torch.testing.assert_close(share, expected[name], **close)
        with pytest.raises((ValueError, RuntimeError), match=r"same rotary or none|refused"):
            parallel(mine[0], HW=HW, rotary=mine[1:] if dist.get_rank() else None)
    dist.destroy_process_group()


def test_tokens_on_two_ranks() -> None:
    on_ranks(2, spread_over_ranks)
