"""Eqs. 1-2 by the kernels: the decision, the plan, the routed product and its two gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dydila_kernels import DyDiLAttention, reference
from dydila_kernels.ops import projection, tiles
from dydila_kernels.testing import (
    Tensors,
    assert_within_twice_plain,
    cast,
    output_and_gradients,
    relative_error,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def plan_of(index: Tensor, num_options: int) -> projection.Plan:
    """Of one side, index (B, N)."""
    order, ends = projection.plan(index[None], num_options)
    return projection.Plan(order[0], ends[0])


class Routed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        plan = plan_of(index, len(weight))
        ctx.save_for_backward(x, weight, *plan)
        return projection.project(x, weight, plan)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, *lists = ctx.saved_tensors
        plan = projection.Plan(*lists)
        dx = projection.project_input_gradient(grad, weight, plan)
        return dx, projection.project_weight_gradient(x, grad, plan, weight.dtype), None


def ours(inputs: Tensors, index: Tensor) -> Tensors:
    return output_and_gradients(lambda t: Routed.apply(t["x"], t["weight"], index), inputs)


def plain(inputs: Tensors, index: Tensor) -> Tensors:
    return output_and_gradients(lambda t: reference.project(t["x"], t["weight"], index.long()), inputs)


def draw(batch: int, length: int, d: int, e: int, num_options: int, dtype: torch.dtype) -> tuple[Tensors, Tensor]:
    """x, weight; and an index."""
    inputs = {"x": torch.randn(batch, length, d), "weight": torch.randn(num_options, d, e) * d**-0.5}
    index = torch.randint(num_options, (batch, length), dtype=torch.int8, device=DEVICE)
    return {name: t.to(DEVICE, dtype) for name, t in inputs.items()}, index


def assert_right(runs: list[tuple[Tensors, Tensor]]) -> None:
    found = [ours(*run) for run in runs]
    oracle = [plain(cast(inputs, torch.float64), index) for inputs, index in runs]
    assert_within_twice_plain(found, [plain(*run) for run in runs], oracle)


def assert_same_bits(found: Tensors, expected: Tensors) -> None:
    assert all(torch.equal(t, expected[name]) for name, t in found.items())


def wider(t: Tensor) -> Tensor:
    """The same values as a chunk of a wider tensor, NaN around them."""
    room = t.new_full((*t.shape[:-1], 3 * t.shape[-1]), torch.nan)
    chunk = room.chunk(3, -1)[1]
    return chunk.copy_(t)


def swapped(t: Tensor) -> Tensor:
    """The same values, as if the second dimension came first in memory."""
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def spaced(t: Tensor) -> Tensor:
    """The same values, each channel apart from the next."""
    return t.repeat_interleave(2, -1)[..., ::2]


# Eq. 1


@pytest.mark.parametrize("router_dtype", ["float32", "that of x"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "num_options"), [(24, 1), (72, 7), (130, 128)])
def test_decides_as_float64(d: int, num_options: int, dtype: torch.dtype, router_dtype: str) -> None:
    x = torch.randn(2, 70, d).to(DEVICE, dtype)
    routers = [
        torch.randn(d, num_options).to(DEVICE, torch.float32 if router_dtype == "float32" else dtype) for _ in "qk"
    ]
    both = projection.route(x, routers)
    for router, index in zip(routers, both, strict=True):
        assert index.shape == (2, 70) and index.dtype == torch.int8
        logits = x.double() @ router.double()
        shortfall = logits.amax(-1) - logits.gather(-1, index.long()[..., None])[..., 0]
        assert shortfall.max() <= 1e-6 * d**0.5  # float32 sums of terms of order 1
        assert torch.equal(projection.route(x, [router])[0], index)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_index(dtype: torch.dtype) -> None:
    x = torch.randn(1, 40, 24).to(DEVICE, dtype)
    router = torch.randn(24, 1).to(DEVICE).expand(24, 5)
    assert not projection.route(x, [router])[0].any()
    assert not projection.route(torch.zeros_like(x), [torch.randn(24, 5).to(DEVICE)])[0].any()


def test_tokens_with_nan_are_projected_too() -> None:
    inputs, _ = draw(1, 20, 24, 24, 3, torch.float32)
    inputs["x"][0, 3] = torch.nan
    index = projection.route(inputs["x"], [torch.randn(24, 3, device=DEVICE)])[0]
    assert index.min() >= 0 and index.max() < 3
    out = projection.project(*inputs.values(), plan_of(index, 3))
    assert out[0, 3].isnan().all() and out.isnan().sum() == 24


@pytest.mark.parametrize("view", [wider, swapped, spaced, lambda x: x.mT])
def test_routes_tokens_of_any_strides(view: Any) -> None:
    x = view(torch.randn(24, 3, 24, device=DEVICE))
    routers = [torch.randn(x.shape[2], 4, device=DEVICE), torch.randn(4, x.shape[2], device=DEVICE).T]
    for found, expected in zip(projection.route(x, routers), projection.route(x.contiguous(), routers), strict=True):
        assert torch.equal(found, expected)


# The plan


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("length", "num_options"), [(1, 3), (1024, 2), (1025, 1), (2500, 7), (2049, 128)])
def test_plan_is_a_stable_sort(length: int, num_options: int) -> None:
    index = torch.randint(num_options, (length,), dtype=torch.int8, device=DEVICE)
    for chosen in (index, torch.full_like(index, num_options - 1), index.long()):
        sides = torch.stack([chosen, chosen.flip(0)])  # each has lists of its own
        for side, order, ends in zip(sides, *projection.plan(sides[:, None], num_options), strict=True):
            assert torch.equal(order.long(), side.argsort(stable=True))
            assert torch.equal(ends.long(), side.long().bincount(minlength=num_options).cumsum(0))


def test_a_layer_plans_both_sides_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    names, launcher = [], tiles.launcher

    def note(kernel: Any, *arguments: Any) -> None:
        names.append(kernel.fn.__name__)
        launcher(kernel, *arguments)

    monkeypatch.setattr(tiles, "launcher", note)
    attn = DyDiLAttention(16, backend="triton", device=DEVICE)
    with torch.no_grad():
        attn(torch.randn(2, 4, 16, device=DEVICE))
    found = [name for name in names if name in ("route_kernel", "count_kernel", "rank_kernel", "project_kernel")]
    assert found == ["route_kernel", "count_kernel", "rank_kernel", "project_kernel", "project_kernel"]


# Eq. 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "length", "d", "e", "num_options"),
    [
        (2, 100, 72, 72, 3),
        (2, 300, 24, 40, 7),  # several tiles of each gradient
        (1, 130, 136, 136, 2),  # two blocks of columns
        (1, 600, 40, 24, 1),  # several tiles of a projector, and of the input's channels
        (3, 1, 8, 8, 9),
        (1, 1, 1, 1, 1),
    ],
)
def test_error_is_that_of_plain_pytorch(
    batch: int, length: int, d: int, e: int, num_options: int, dtype: torch.dtype
) -> None:
    assert_right([draw(batch, length, d, e, num_options, dtype) for _ in range(5 if batch * length < 100 else 1)])


@settings(max_examples=12)
@given(
    sizes=st.tuples(*[st.integers(0, 3), st.integers(0, 80), *[st.integers(1, 80)] * 2, st.integers(1, 12)]),
    dtype=st.sampled_from(DTYPES),
)
def test_sizes_at_random(sizes: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    inputs, index = draw(*sizes, dtype)
    found, oracle = ours(inputs, index), plain(cast(inputs, torch.float64), index)
    for name, t in found.items():
        assert t.shape == oracle[name].shape and t.dtype == dtype
        assert relative_error(t, oracle[name]) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("chosen", [[0, 2], [1], [2]])
def test_a_projector_without_tokens_gets_a_zero_gradient(chosen: list[int]) -> None:
    inputs, index = draw(2, 150, 24, 24, 3, torch.float32)
    index = torch.tensor(chosen, dtype=torch.int8, device=DEVICE)[(index % len(chosen)).long()]
    inputs["weight"][[u for u in range(3) if u not in chosen]] = torch.nan  # and is not read
    found = ours(inputs, index)
    for u in range(3):
        assert found["weight"][u].any() == (u in chosen)
    assert_right([({**inputs, "weight": inputs["weight"].nan_to_num()}, index)])


@pytest.mark.parametrize("shape", [(0, 7), (2, 0)])
def test_empty_batches_launch_nothing(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "launcher", lambda *_: pytest.fail("launched"))
    inputs, index = draw(*shape, 24, 40, 3, torch.bfloat16)
    found = ours(inputs, index)
    assert found["output"].shape == (*shape, 40) and found["x"].shape == (*shape, 24)
    assert found["weight"].shape == (3, 24, 40) and not found["weight"].any()
    assert [t.shape for t in projection.route(inputs["x"], [torch.randn(24, 3)] * 2)] == [shape] * 2


@pytest.mark.parametrize("view", [wider, swapped, spaced, lambda t: t.mT.contiguous().mT])
def test_any_strides(view: Any) -> None:
    inputs, index = draw(2, 50, 24, 40, 3, torch.bfloat16)
    plan, grad = plan_of(index, 3), torch.randn(2, 50, 40).to(inputs["x"])
    strided = {name: view(t) for name, t in inputs.items()}
    for function, arguments in [
        (projection.project, (*inputs.values(), plan)),
        (projection.project_input_gradient, (grad, inputs["weight"], plan)),
        (projection.project_weight_gradient, (inputs["x"], grad, plan)),
    ]:
        viewed = [view(t) if isinstance(t, Tensor) else t for t in arguments]
        assert torch.equal(function(*viewed), function(*arguments))
    assert_same_bits(strided, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_to_the_bit_in_poisoned_memory(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    inputs, index = draw(2, 300, 24, 40, 5, dtype)
    index[index == 1] = 3
    first = ours(inputs, index)
    assert_same_bits(ours(inputs, index), first)
    request.getfixturevalue("poisoned")
    assert_same_bits(ours(inputs, index), first)


def test_the_weight_gradient_is_summed_in_float32() -> None:
    """2048 + 1 is 2048 in float16 and bfloat16; the parts are rounded once, at the end."""
    x = torch.ones(1, 4100, 1, device=DEVICE, dtype=torch.bfloat16)
    plan = plan_of(torch.zeros(1, 4100, dtype=torch.int8, device=DEVICE), 1)
    assert projection.project_weight_gradient(x, x, plan).item() == 4100


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="torch has no grouped_mm")
def test_equals_grouped_mm() -> None:
    inputs, index = draw(2, 100, 64, 64, 4, torch.bfloat16)
    plan = plan_of(index, 4)
    order = plan.order.long()
    product = torch.nn.functional.grouped_mm(inputs["x"].flatten(0, 1)[order], inputs["weight"], offs=plan.ends)
    out = projection.project(*inputs.values(), plan).flatten(0, 1)[order]
    assert relative_error(out, product) < 1e-3  # sums in another order, so some round the other way


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """Four rows of memory, each 2^30 + 16 elements after the last: row 2 is the first beyond 2^31."""
    size = 3 * (2**30 + 16) + 4096
    if DEVICE == "cuda":
        return torch.empty(size, device=DEVICE, dtype=torch.bfloat16)
    path: Path = tmp_path_factory.mktemp("sparse") / "memory"
    memory = torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16)  # takes only the pages touched
    path.unlink()
    return memory


def test_rows_far_apart(far: Tensor) -> None:
    apart, d = 2**30 + 16, 16
    inputs, index = draw(1, 4, d, d, 4, torch.bfloat16)
    index[0] = torch.tensor([2, 0, 3, 1])
    plan, (x, weight) = plan_of(index, 4), inputs.values()
    grad = torch.randn(1, 4, d).to(x)
    router = torch.randn(d, 4, device=DEVICE)

    tokens = far.as_strided((1, 4, d), (0, apart, 1)).copy_(x)
    assert torch.equal(projection.route(tokens, [router])[0], projection.route(x, [router])[0])
    assert torch.equal(projection.project(tokens, weight, plan), projection.project(x, weight, plan))
    expected = projection.project_weight_gradient(x, grad, plan)
    assert torch.equal(projection.project_weight_gradient(tokens, grad, plan), expected)
    assert torch.equal(
        projection.project_weight_gradient(grad, tokens, plan), projection.project_weight_gradient(grad, x, plan)
    )

    projectors = far.as_strided((4, d, d), (apart, d, 1)).copy_(weight)
    assert torch.equal(projection.project(x, projectors, plan), projection.project(x, weight, plan))
    one, few = plan_of(torch.zeros_like(index), 1), weight[:1, :4]
    inputs_apart = far.as_strided((1, 4, d), (0, apart, 1)).copy_(few)
    assert torch.equal(projection.project(x[..., :4], inputs_apart, one), projection.project(x[..., :4], few, one))
    found = projection.project_input_gradient(grad, inputs_apart, one)
    assert torch.equal(found, projection.project_input_gradient(grad, few, one))
