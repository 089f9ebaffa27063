"""The core as a whole: the form for wide heads, what is saved and allocated, far addresses, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dydila_kernels import dydila_attention
from dydila_kernels.ops import backward, core, tiles
from dydila_kernels.ops.context import LaunchContext
from dydila_kernels.testing import TOKENS, Tensors, relative_error
from tests.ops.helpers import (
    DEVICE,
    DTYPES,
    TALL,
    assert_repeats,
    assert_same_bits,
    attend,
    combinations,
    compare_core,
    inputs_of,
    operator_arguments,
    oracle,
    results,
    use_gemm,
    use_tiles,
)
from tests.test_memory import peak

# Wide heads


@pytest.fixture
def pays(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[bool]]:
    """Which orders of the products were taken: whether scores."""
    taken: set[bool] = set()
    by_scores = LaunchContext.by_scores.fget
    monkeypatch.setattr(LaunchContext, "by_scores", property(lambda c: taken.add(by_scores(c)) or by_scores(c)))
    yield taken


@pytest.mark.parametrize("length", [13, 29])
@pytest.mark.parametrize(("i", "options"), list(enumerate(combinations(1))), ids=str)
def test_error_is_that_of_plain_pytorch(
    i: int, options: dict[str, Any], length: int, pays: set[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """(Q K^T) V and Q (K^T V), for all options; each number format with each of them."""
    use_gemm(monkeypatch)
    compare_core(DTYPES[(i + i // 3 + (length > 20)) % 3], 1, length, 24, **options)
    assert pays == {length < 24}


@pytest.mark.parametrize(("dim", "num_heads", "length"), [(136, 1, 20), (136, 1, 137), (288, 2, 40)])
def test_heads_of_more_than_128_channels(dim: int, num_heads: int, length: int, pays: set[bool]) -> None:
    compare_core(torch.bfloat16, 1, length, dim, seeds=2, num_heads=num_heads)
    assert pays == {length < dim // num_heads}


@pytest.mark.parametrize(
    ("bounds", "dtype", "options"),
    [
        ([0, 5, 5, 6, 17], torch.float32, {"normalization": "denominator", "router_gradient": "straight_through"}),
        ([0, 5, 5, 6, 40], torch.float32, {"normalization": "denominator"}),
        ([0, 5, 5, 6, 17], torch.float16, {"differential": "map"}),
        ([0, 5, 5, 6, 40], torch.float16, {"num_heads": 2}),
    ],
    ids=str,
)
def test_packed_images(
    dtype: torch.dtype, options: dict[str, Any], bounds: list[int], pays: set[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_gemm(monkeypatch)
    use_tiles(monkeypatch)
    compare_core(dtype, 1, bounds[-1], 24, cu_seqlens=bounds, **options)
    assert pays == {bounds[-1] == 17}


@pytest.mark.parametrize(("length", "dtype"), [(13, torch.float32), (13, torch.float16), (29, torch.bfloat16)])
def test_masks(dtype: torch.dtype, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_gemm(monkeypatch)
    mask = torch.rand(2, length, device=DEVICE) < 0.6
    mask[1] = False
    normalization = "length" if length == 13 else "denominator"
    compare_core(dtype, 2, length, 24, mask=mask, normalization=normalization)


@pytest.mark.parametrize(("i", "length"), [(0, 13), (4, 29), (7, 29)])
def test_backward_twice_is_equal_to_the_bit_in_poisoned_memory(
    i: int, length: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_gemm(monkeypatch)
    use_tiles(monkeypatch)
    options: dict[str, Any] = combinations(0)[i]
    inputs = inputs_of(1, length, 24, torch.bfloat16, differential=options["differential"])
    assert_repeats(inputs, request, mask=torch.rand(1, length, device=DEVICE) < 0.7, **options)


# Memory


@pytest.fixture
def tall_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, *TALL)


forms = pytest.mark.parametrize("form", ["fused", "states", "scores"])


def shape_of(form: str) -> tuple[int, int, int]:
    """Batch, N and d that take this form; for scores a few short images in the place of a long one."""
    return {"fused": (1, 1000, 128), "states": (1, 1000, 136), "scores": (4, 40, 136)}[form]


@forms
@pytest.mark.parametrize(("trained", "normalization"), [(False, "length"), (True, "denominator")])
@pytest.mark.usefixtures("tall_tiles")
def test_keeps_the_inputs_decisions_and_a_few_numbers_per_row(trained: bool, normalization: str, form: str) -> None:
    """To the byte: the tokens once each, int8 decisions, float32 statistics, one state for each image."""
    batch, length, dim = {"fused": (2, 50, 32), "states": (1, 136, 136), "scores": (2, 20, 136)}[form]
    heads = 2 if form == "fused" else 1
    inputs = inputs_of(batch, length, dim, torch.bfloat16, num_kernel_factors=5, num_differential_factors=4)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    router_gradient = "straight_through" if trained else "none"
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        attend(leaves, num_heads=heads, normalization=normalization, router_gradient=router_gradient)
    rows = batch * length
    expected = sum(t.nbytes for t in inputs.values()) + 2 * 3 * rows + 2 * 2 * 3 * rows * 4
    expected += 2 * batch * dim * dim // heads if form != "scores" else 0
    expected += 2 * 2 if form != "fused" else 0  # see core.spare
    expected += 4 * batch * dim + 4 * rows * heads if normalization == "denominator" else 0
    expected += 4 * rows * (2 * 2 * 5 + 2 * 4) if trained else 0
    assert sum(saved.values()) == expected


@forms
@pytest.mark.parametrize(("view", "normalization"), [(True, "length"), (False, "denominator")])
@pytest.mark.usefixtures("tall_tiles")
def test_allocates_nothing_of_the_size_of_the_tokens_but_the_results(view: bool, normalization: str, form: str) -> None:
    """Forward the output, and for wide heads one more; backward the five gradients, which for wide heads have room for
    what they are made of unless they lie together.  Chunks are not copied."""
    batch, length, dim = shape_of(form)
    inputs = inputs_of(batch, length, dim, torch.bfloat16)
    if view:
        inputs.update(zip(TOKENS[:3], torch.cat([inputs[name] for name in TOKENS[:3]], -1).chunk(3, -1), strict=True))
    heads = 4 if form == "fused" else 1
    arguments = operator_arguments(inputs, normalization=normalization, num_heads=heads)
    incoming = torch.randn_like(inputs["q"])
    known = [*inputs.values(), incoming]
    out, saved = core.forward(*arguments)
    one = out.nbytes
    kept = [t for t in saved if t is not None]
    small = sum(t.nbytes for t in kept) + one // 2  # partial sums, and products of tokens, of which N < d
    if not tiles.INTERPRETED:  # in the Gluon form: of sides and branches five parts of routers, 16 choices of 2 bytes
        small += 2 * 2 * 5 * 16 * 2 * (dim + 256)
    at_most = peak(lambda: core.forward(*arguments), known)
    assert one <= at_most <= one * (1 if form == "fused" else 2) + small
    for together, more in ((False, 0), (True, {"fused": 0, "states": 2, "scores": 4}[form])):
        found = peak(lambda: backward.backward(incoming, *arguments, saved, together=together), [*known, *kept])  # noqa: B023
        assert (5 + more) * one <= found <= (5 + more) * one + small


# Addresses

APART = 2**30 + 64


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """Memory for four rows, APART elements from each other: row 2 is the first beyond 2^31."""
    size = 3 * APART + 4096
    if DEVICE == "cuda":
        return torch.empty(size, device=DEVICE, dtype=torch.bfloat16)
    path: Path = tmp_path_factory.mktemp("sparse") / "memory"
    memory = torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16)  # takes only the pages touched
    path.unlink()
    return memory


@pytest.mark.parametrize("by_gemm", [False, True])
@pytest.mark.parametrize("shape", [(1, 4, 16), (4, 1, 16)])
@pytest.mark.parametrize("differential", ["token", "map"])
def test_rows_far_apart(
    differential: str, shape: tuple[int, ...], by_gemm: bool, far: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens and the incoming gradient with row and batch strides whose offsets pass 2^31 elements."""
    if by_gemm:
        use_gemm(monkeypatch)
    options: dict[str, Any] = {"differential": differential, "normalization": "denominator"}
    inputs = inputs_of(*shape, torch.bfloat16, differential=differential)
    incoming = torch.randn(shape).to(inputs["q"])
    strides = (APART, 16, 1) if shape[0] == 4 else (0, APART, 1)
    apart = {
        name: far.as_strided(shape, strides, 16 * i).copy_(t)
        for i, (name, t) in enumerate([*((name, inputs[name]) for name in TOKENS), ("incoming", incoming)])
    }
    found = []
    for tensors, grad in (({**inputs, **apart}, apart["incoming"]), (inputs, incoming)):
        leaves = {name: tensors[name].detach().requires_grad_() for name in inputs}
        out = attend(leaves, **options)
        grads = torch.autograd.grad(out, list(leaves.values()), grad, materialize_grads=True)
        found.append({"output": out, **dict(zip(leaves, grads, strict=True))})
    if by_gemm:  # torch may sum in another order
        for name, t in found[0].items():
            assert relative_error(t, found[1][name]) < 0.01, name
    else:
        assert_same_bits(*found)


# Backends


def test_auto_is_the_torch_backend_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "forward", lambda *_: pytest.fail("a kernel was called"))
    inputs: Tensors = {name: t.cpu() for name, t in inputs_of(1, 5, 8).items()}
    assert torch.equal(dydila_attention(**inputs), dydila_attention(**inputs, backend="torch"))
    with pytest.raises(pytest.fail.Exception, match="a kernel was called"):
        attend(inputs_of(1, 5, 8))


def test_what_cannot_run_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"take float16, bfloat16 and float32, not torch\.float64"):
        attend(inputs_of(1, 5, 8, torch.float64))
    with pytest.raises(RuntimeError, match="among 128 factors or projectors at most, not 129"):
        attend(inputs_of(1, 5, 8, num_kernel_factors=129))
    with pytest.raises(RuntimeError, match="not 130"):
        attend(inputs_of(1, 5, 8, num_differential_factors=130))
    assert attend(inputs_of(1, 5, 8, num_kernel_factors=128)).isfinite().all()


@pytest.mark.parametrize(("dim", "heads", "gamma"), [(48, 6, 16.0), (48, 6, 64.0), (144, 1, 32.0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_inverse_denominator_stays_in_range(dtype: torch.dtype, dim: int, heads: int, gamma: float) -> None:
    """1/denominator of a head of tiny powers passes the range of float16, and of float32 where it counts as nothing."""
    inputs = inputs_of(1, 12, dim, dtype, gamma=(gamma, gamma))
    for name in ("q", "k", "q_redundant", "k_redundant"):  # one channel above all others: one head has it all
        inputs[name] = inputs[name].clamp(-1, 1) / 2
        inputs[name][..., 0] = 1
    options = {"num_heads": heads, "normalization": "denominator"}
    found, truth = results(inputs, **options), oracle(inputs, **options)
    assert all(t.isfinite().all() for t in found.values())
    head = dim // heads
    limit = 4 * torch.finfo(dtype).eps
    assert relative_error(found["output"][..., :head], truth["output"][..., :head]) < limit


@pytest.mark.parametrize("normalization", ["length", "denominator"])
@pytest.mark.parametrize("length", [8, 200])
def test_an_empty_batch_of_wide_heads(normalization: str, length: int) -> None:
    inputs = inputs_of(0, length, 136)
    assert all(t.numel() == 0 or not t.any() for t in results(inputs, normalization=normalization).values())


def test_follows_the_new_name_of_the_tf32_setting() -> None:
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has the old name only")
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert tiles.numerics(torch.float32)["PRECISION"] == "tf32"
        matmul.fp32_precision = "ieee"
        assert tiles.numerics(torch.float32)["PRECISION"] == "ieee"
    finally:
        matmul.fp32_precision = before


def test_too_many_tokens_are_refused() -> None:
    tiles.check_tokens(2**31 - 2**16)
    with pytest.raises(ValueError, match="2147418112 tokens"):
        tiles.check_tokens(2**31)
