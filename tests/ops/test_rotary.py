"""Rotary embeddings by the kernels: the 2x rule, relative positions, tables of every kind, what is saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dydila_kernels import dydila_attention, reference
from dydila_kernels.checks import PAIRINGS
from dydila_kernels.ops import backward, core, rotary
from dydila_kernels.ops.context import LaunchContext, Rotary
from dydila_kernels.testing import Tensors, cast, decisions, output_and_gradients, relative_error
from tests.ops.helpers import (
    DEVICE,
    DTYPES,
    TALL,
    assert_repeats,
    assert_right,
    assert_same_bits,
    attend,
    combinations,
    compare_layer,
    inputs_of,
    layer_of,
    operator_arguments,
    tokens,
    use_tiles,
)
from tests.test_memory import peak
from tests.test_rotary import of_grid, tables

every_pairing = pytest.mark.parametrize("pairing", PAIRINGS)
TABLES = ("cos", "sin")
by_kernels = partial(dydila_attention, backend="triton")


def on_device(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin of random angles for each channel."""
    cos, sin = tables(*shape)
    return cos.to(DEVICE, dtype), sin.to(DEVICE, dtype)


def call(function: Callable[..., Tensor], t: Tensors, **options: Any) -> Tensor:
    """Tables among the tensors, so that they are learned."""
    rest = {name: value for name, value in t.items() if name not in TABLES}
    return function(**rest, rotary=(t["cos"], t["sin"]), **options)


def compare(
    dtype: torch.dtype, batch: int, length: int, dim: int, *, num_heads: int = 1, shared: bool = False, seeds: int = 3,
    **options: Any,
) -> None:  # fmt: skip
    """The 2x rule for the output and all gradients, those of the tables among them."""
    found, plain, truth = [], [], []
    options["num_heads"] = num_heads
    for seed in range(seeds):
        inputs = inputs_of(
            batch, length, dim, dtype, gamma=(1.0, 4.0), seed=seed, differential=options.get("differential", "token"),
            num_kernel_factors=9, num_differential_factors=7,
        )  # fmt: skip
        at = decisions(inputs, backend="triton", **options)
        shape = (length, dim // num_heads) if shared else (batch, length, dim // num_heads)
        inputs |= dict(zip(TABLES, on_device(*shape, dtype=dtype), strict=True))
        found.append(output_and_gradients(lambda t: call(by_kernels, t, **options), inputs))
        for precision, runs in ((dtype, plain), (torch.float64, truth)):
            runs.append(
                output_and_gradients(
                    lambda t, at=at: call(reference.dydila_attention, t, indices=at, **options), cast(inputs, precision)
                )
            )
    assert_right(found, plain, truth)


@every_pairing
@pytest.mark.parametrize(("i", "options"), list(enumerate(combinations(0))), ids=str)
def test_error_is_that_of_plain_pytorch(
    i: int, options: dict[str, Any], pairing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States and scores, tables of each image and of all, each number format."""
    use_tiles(monkeypatch)
    second = pairing == "halves"
    compare(
        DTYPES[(i + i // 3 + second) % 3], 2, 13, 24, num_heads=1 if i % 2 else 3, shared=second,
        rotary_pairing=pairing, **options,
    )  # fmt: skip


@every_pairing
@pytest.mark.parametrize("kind", ["mask", "packed"])
@pytest.mark.parametrize("normalization", ["length", "denominator"])
def test_masks_and_packed_images(normalization: str, kind: str, pairing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch)
    options: dict[str, Any] = {"normalization": normalization, "rotary_pairing": pairing, "num_heads": 2}
    dtype = torch.float16 if pairing == "halves" else torch.float32
    if kind == "mask":
        compare(dtype, 2, 19, 24, mask=torch.arange(38, device=DEVICE).view(2, 19) % 3 != 0, **options)
    else:
        compare(dtype, 1, 26, 24, cu_seqlens=[0, 5, 5, 6, 26], **options)


@pytest.mark.parametrize(("dim", "num_heads"), [(8, 4), (18, 3), (144, 2), (136, 1), (288, 2)])
@every_pairing
def test_heads_of_every_size(dim: int, num_heads: int, pairing: str) -> None:
    """Of one pair, of an odd number of pairs, of part of a tile, of several."""
    compare(torch.bfloat16, 1, 20, dim, num_heads=num_heads, seeds=2, rotary_pairing=pairing)


@every_pairing
def test_of_the_layer(pairing: str) -> None:
    configuration = {"num_heads": 2, "num_prefix_tokens": 1, "qk_norm": "rms", "normalization": "denominator"}
    attn = layer_of(24, dtype=torch.bfloat16, **configuration)
    compare_layer(attn, 13, batch=2, HW=(3, 4), rotary=on_device(13, 12), rotary_pairing=pairing)
    attn = layer_of(24, num_heads=3, differential="map", router_gradient="straight_through")
    arguments = {"HW": [(2, 3), (2, 2, 3)], "cu_seqlens": [0, 6, 18]}
    compare_layer(attn, 18, rotary=on_device(18, 8), rotary_pairing=pairing, **arguments)


@pytest.mark.parametrize("normalization", ["length", "denominator"])
@every_pairing
def test_only_relative_positions_count(pairing: str, normalization: str) -> None:
    """A grid that is shifted as a whole gives the same; tokens that change places do not."""
    attn = layer_of(32, num_heads=2, normalization=normalization, dwc_branches=())
    x = tokens(2, 20, 32)

    def at(*offset: float) -> Tensor:
        rotary = tuple(t.to(DEVICE) for t in of_grid((4, 5), offset, 16, pairing))
        return attn(x, HW=(4, 5), rotary=rotary, rotary_pairing=pairing)

    expected = at(0, 0)
    for offset in ((3, 0), (0, -7), (2.5, 11)):
        assert relative_error(at(*offset), expected) < 1e-5
    assert relative_error(attn(x, HW=(4, 5)), expected) > 1e-2
    cos, sin = (t.flip(0).to(DEVICE) for t in of_grid((4, 5), (0, 0), 16, pairing))
    assert relative_error(attn(x, rotary=(cos, sin), rotary_pairing=pairing), expected) > 1e-2


# The kernel -----------------------------------------------------------------------------------------------------------


@every_pairing
def test_the_kernel_is_its_equation_and_its_transpose(pairing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch)
    x, y = tokens(2, 19, 36), tokens(2, 19, 36)
    cos, sin = on_device(2, 19, 18)
    context = LaunchContext(
        x, torch.ones(1, device=DEVICE), None, None, None, (), 2, "length", rotary=Rotary(cos, sin, pairing)
    )
    turned, back = x.clone(), y.clone()
    rotary.rotate(context, turned)
    rotary.rotate(context, back, transposed=True)
    assert relative_error(turned, reference.rotate(x.double(), cos.double(), sin.double(), pairing, 2)) < 1e-6
    assert (turned * y).sum().item() == pytest.approx((x * back).sum().item(), rel=1e-4)


@every_pairing
def test_tables_in_every_form_give_the_same_bits(pairing: str) -> None:
    inputs, options = inputs_of(2, 9, 16), {"num_heads": 2, "rotary_pairing": pairing}
    angles = torch.randn(9, 4).to(DEVICE)
    pairs = torch.cat([angles, angles], -1) if pairing == "halves" else angles.repeat_interleave(2, -1)
    cos, sin = pairs.cos(), pairs.sin()
    expected = attend(inputs, rotary=(cos, sin), **options)
    for given in (
        (cos.double(), sin.double()),
        (cos[None], sin.expand(2, 9, 8)),
        (cos.mT.contiguous().mT, sin.repeat(2, 1, 1)),
        torch.polar(torch.ones_like(angles), angles),
    ):
        assert relative_error(attend(inputs, rotary=given, **options), expected) < 1e-6
    narrow = (cos.bfloat16(), sin.bfloat16())
    widened = tuple(t.float() for t in narrow)
    assert torch.equal(attend(inputs, rotary=narrow, **options), attend(inputs, rotary=widened, **options))


def test_hidden_tokens_and_their_tables_are_not_seen() -> None:
    attn, mask = layer_of(16, num_heads=2), torch.arange(18, device=DEVICE).view(2, 9) % 3 != 0
    x, turned = tokens(2, 9, 16), on_device(2, 9, 8)
    spoilt = [torch.where(mask[..., None], t, torch.nan) for t in (x, *turned)]
    found = []
    for t, *rotary_tables in ([x, *turned], spoilt):
        leaf = t.clone().requires_grad_()
        out = attn(leaf, mask, rotary=rotary_tables)
        found.append({"output": out.detach(), "x": torch.autograd.grad(out.square().sum(), leaf)[0]})
    assert_same_bits(*found)


@every_pairing
@pytest.mark.parametrize(("i", "heads"), [(0, 2), (2, 3), (4, 1), (7, 2)])
def test_backward_twice_is_equal_to_the_bit_in_poisoned_memory(
    i: int, heads: int, pairing: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tiles(monkeypatch)
    options: dict[str, Any] = {**combinations(0)[i], "num_heads": heads, "rotary_pairing": pairing}
    inputs = inputs_of(1, 19, 24, torch.bfloat16, differential=options["differential"])
    learned = {**inputs, **dict(zip(TABLES, on_device(19, 24 // heads), strict=True))}
    first = output_and_gradients(lambda t: call(by_kernels, t, **options), learned)
    mask = torch.rand(1, 19, device=DEVICE) < 0.7
    assert_repeats(inputs, request, mask=mask, rotary=on_device(1, 19, 24 // heads), **options)
    assert_same_bits(output_and_gradients(lambda t: call(by_kernels, t, **options), learned), first)


def test_learned_tables_shared_by_a_batch_are_those_of_the_torch_backend() -> None:
    """One of the two learned, too, and both through an angle."""
    inputs = {**inputs_of(2, 9, 16), "angles": torch.randn(9, 8).to(DEVICE)}
    for learned in (("cos", "sin"), ("cos",), ("sin",)):

        def of(t: Tensors, backend: str, learned: tuple[str, ...] = learned) -> Tensor:
            rest = {name: value for name, value in t.items() if name != "angles"}
            both = {"cos": t["angles"].cos(), "sin": t["angles"].sin()}
            both = {name: table if name in learned else table.detach() for name, table in both.items()}
            return dydila_attention(**rest, num_heads=2, rotary=(both["cos"], both["sin"]), backend=backend)

        found, expected = (
            output_and_gradients(lambda t, backend=backend: of(t, backend), inputs, ["q", "angles"])
            for backend in ("triton", "torch")
        )
        for name, t in found.items():
            assert relative_error(t, expected[name]) < 1e-5, name
        assert found["angles"].norm() > 1e-3


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "heads"), [(40, 2), (10, 1)], ids=["states", "scores"])
def test_saves_what_wide_heads_save_and_the_tables_as_they_came(
    length: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte: tables that images share are saved once."""
    use_tiles(monkeypatch, *TALL)
    inputs = inputs_of(2, length, 32, torch.bfloat16)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    rotary_tables = on_device(length, 32 // heads)
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        attend(leaves, num_heads=heads, rotary=rotary_tables)
    rows = 2 * length
    expected = sum(t.nbytes for t in (*inputs.values(), *rotary_tables)) + 2 * 3 * rows + 2 * 2 * 3 * rows * 4
    expected += 2 * 2  # see core.spare
    expected += 2 * 2 * 32 * 32 // heads if length > 32 // heads else 0
    assert sum(saved.values()) == expected


def test_allocates_what_wide_heads_allocate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward the output and one more, backward the five gradients: both turn in place."""
    use_tiles(monkeypatch, *TALL)
    inputs, rotary_tables = inputs_of(1, 1000, 128, torch.bfloat16), on_device(1000, 32)
    arguments = operator_arguments(inputs, num_heads=4, rotary=rotary_tables)
    incoming = torch.randn_like(inputs["q"])
    out, saved = core.forward(*arguments)
    kept = [t for t in saved if t is not None]
    one, small = out.nbytes, sum(t.nbytes for t in kept) + out.nbytes // 2
    known = [*inputs.values(), *rotary_tables, incoming, *kept]
    assert 2 * one <= peak(lambda: core.forward(*arguments), known) <= 2 * one + small
    assert 5 * one <= peak(lambda: backward.backward(incoming, *arguments, saved), known) <= 5 * one + small
