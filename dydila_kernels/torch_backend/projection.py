"""Eqs. 1-2: each token times its projector.  x (B, N, d), weight (n_P, d, d), index (B, N) -> (B, N, d).

A block of tokens is sorted by projector, multiplied group by group and put back, so the work is that of one
projection whatever n_P is, and a projector without a token costs nothing and gets a zero gradient.

A tracer sees the operator ``dydila_kernels::grouped_projection``, so that a compiled or exported layer does no more;
torch.func and forward-mode AD take the reference equation.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dydila_kernels import reference
from dydila_kernels.precision import accumulation_dtype, no_autocast
from dydila_kernels.torch_backend.blocks import (
    SPARE,
    Workspace,
    all_blocks,
    choices_of_each,
    is_transformed,
    router_logits,
    side_by_side,
    takes_plain_path,
    workspace,
)
from dydila_kernels.torch_backend.products import add_product, group_tile, multiply


def projection_logits(x: Tensor, router: Tensor) -> Tensor:
    """``x @ router`` (B, N, n) in the accumulation dtype, a block at a time."""
    dtype = accumulation_dtype(x.dtype)
    with no_autocast(x.device):
        router = router.to(dtype)
        if takes_plain_path(x, router) or not x.numel():
            return x.to(dtype) @ router
        blocks = [
            [router_logits((x[images, rows].to(dtype), router)) for rows in ranges] for images, ranges in all_blocks(x)
        ]
        images = [parts[0] if len(parts) == 1 else torch.cat(parts, 1) for parts in blocks]
        return images[0] if len(images) == 1 else torch.cat(images)


@torch.no_grad()
def route(x: Tensor, routers: Sequence[Tensor]) -> Tensor:
    """Eq. 1 for routers (d, n_P) of one shape, which read x (B, N, d) once: (routers, B, N) int64."""
    dtype = accumulation_dtype(x.dtype)
    with no_autocast(x.device):
        if takes_plain_path(x, *routers):
            return torch.stack([(x.to(dtype) @ router.to(dtype)).argmax(-1) for router in routers])
        index = torch.empty((len(routers), *x.shape[:2]), dtype=torch.int64, device=x.device)
        beside = side_by_side(routers, dtype)
        for images, ranges in all_blocks(x):
            for rows in ranges:
                block = x[images, rows].to(dtype)
                for i, choices in enumerate(choices_of_each(block, beside, len(routers))):
                    index[i, images, rows] = choices
        return index


class Groups(NamedTuple):
    """The m rows of a block by projector: each has ``sizes`` places, which its rows and then ``spare`` ones take.

    rows: (places,), which row is where, and row 0 in the spare places; places: (m,), where each row is; spare: (s,).
    """

    sizes: list[int]
    rows: Tensor
    places: Tensor
    spare: Tensor

    @classmethod
    def of(cls, index: Tensor, choices: int, tile: int) -> Groups:
        """index (m,); the sizes are multiples of ``tile``."""
        order, device = index.argsort(stable=True), index.device
        counts = index.bincount(minlength=choices).tolist()
        sizes = [count + -count % tile for count in counts]
        begins = [0, *accumulate(sizes)]
        ends = [begin + count for begin, count in zip(begins, counts, strict=False)]
        taken = torch.cat([torch.arange(*group, device=device) for group in zip(begins, ends, strict=False)])
        spare = [place for end, begin in zip(ends, begins[1:], strict=True) for place in range(end, begin)]
        rows = order.new_zeros(begins[-1]).index_copy_(0, taken, order)
        return cls(sizes, rows, torch.empty_like(order).scatter_(0, order, taken), order.new_tensor(spare))

    def gather(self, rows: Tensor, memory: Workspace, name: str) -> Tensor:
        """The rows of a block, (m, d), where they are here."""
        out = memory.take(name, (len(self.rows), rows.shape[1]), rows.dtype, rows.device)
        return torch.index_select(rows, 0, self.rows, out=out)

    def scatter(self, products: Tensor, out: Tensor) -> Tensor:
        """What has been made here, written to where the rows of the block are, (m, e)."""
        # (On a CPU twice as fast as index_copy_.)
        return torch.index_select(products, 0, self.places, out=out)


def project_block(out: Tensor, x: Tensor, weight: Tensor, index: Tensor, memory: Workspace) -> None:
    """Writes Eq. 2 for a block of tokens x (b, n, d), routed by index (b, n), into the contiguous ``out`` (b, n, e)."""
    rows = x.flatten(0, 1)
    groups = Groups.of(index.flatten(), len(weight), group_tile(rows, weight))
    sources = groups.gather(rows, memory, SPARE[0])
    products = memory.take(SPARE[1], (len(sources), weight.shape[-1]), out.dtype, out.device)
    for w, source, product in zip(weight, sources.split(groups.sizes), products.split(groups.sizes), strict=True):
        multiply(source, w, product)
    groups.scatter(products, out.view(-1, out.shape[-1]))


def project_block_backward(
    grad: Tensor, x: Tensor, weight: Tensor, index: Tensor, total: Tensor | None, need_x: bool, memory: Workspace
) -> Tensor | None:
    """Adds the gradient of the weight to ``total``, where given; returns that of x (b, n, d), where needed."""
    rows = x.flatten(0, 1)
    groups = Groups.of(index.flatten(), len(weight), group_tile(rows, weight))
    gradients = groups.gather(grad.flatten(0, 1), memory, SPARE[1])
    if total is not None:
        sources = groups.gather(rows, memory, SPARE[0])
        for padded in (sources, gradients):
            padded.index_fill_(0, groups.spare, 0)
        for dw, source, gradient in zip(total, sources.split(groups.sizes), gradients.split(groups.sizes), strict=True):
            add_product(dw, source.to(dw.dtype).T, gradient.to(dw.dtype))
    if not need_x:
        return None
    products = memory.take(SPARE[0], (len(gradients), rows.shape[1]), rows.dtype, rows.device)
    for w, gradient, product in zip(weight, gradients.split(groups.sizes), products.split(groups.sizes), strict=True):
        multiply(gradient, w.T, product)
    return groups.scatter(products, torch.empty_like(rows)).view(x.shape)


def forward(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """Eq. 2, block by block: (B, N, e), contiguous."""
    out = x.new_empty((*x.shape[:2], weight.shape[-1]))
    with workspace() as memory, torch.no_grad(), no_autocast(x.device):
        for images, ranges in all_blocks(x):
            for rows in ranges:
                project_block(out[images, rows], x[images, rows], weight, index[images, rows], memory)
    return out


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, index: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of weight that are needed."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    total = torch.zeros_like(weight, dtype=accumulation_dtype(weight.dtype)) if need_weight else None
    with workspace() as memory, torch.no_grad(), no_autocast(grad.device):
        for images, ranges in all_blocks(x):
            for at in ((images, rows) for rows in ranges):
                block = project_block_backward(grad[at], x[at], weight, index[at], total, need_x, memory)
                if dx is not None and block is not None:
                    dx[at] = block
    return dx, None if total is None else total.to(weight.dtype)


class GroupedProjection(torch.autograd.Function):
    """Eq. 2 and its gradients, the second ones included."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, index)
        return forward(x, weight, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, index = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *grouped_projection_backward(grad, x, weight, index), None
        return *backward(grad, x, weight, index, *ctx.needs_input_grad[:2]), None


# What a tracer sees ---------------------------------------------------------------------------------------------------

grouped_projection = torch.library.custom_op(
    "dydila_kernels::grouped_projection",
    forward,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor index) -> Tensor",
)


@torch.library.custom_op(
    "dydila_kernels::grouped_projection_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor index) -> (Tensor, Tensor)",
)
def grouped_projection_backward(
    grad: Tensor, x: Tensor, weight: Tensor, index: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    return backward(grad, x, weight, index, True, True)


@grouped_projection.register_fake
def _(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], weight.shape[-1]))


@grouped_projection_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *grouped_projection_backward(grad, *ctx.saved_tensors), None


def _differentiate_twice(ctx: Any, ddx: Tensor, ddweight: Tensor) -> tuple[Tensor | None, ...]:
    """Of dx = dy W_u^T and dW_u = sum x^T dy, with respect to dy, x and W."""
    grad, x, weight, index = ctx.saved_tensors
    dgrad = grouped_projection(ddx, weight, index) + grouped_projection(x, ddweight, index)
    dweight = grouped_projection_backward(grad, ddx, weight, index)[1]
    return dgrad, grouped_projection(grad, ddweight.mT, index), dweight, None


torch.library.register_autograd(grouped_projection, _differentiate, setup_context=_save)
torch.library.register_autograd(grouped_projection_backward, _differentiate_twice, setup_context=_save)


# Either ---------------------------------------------------------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    """``out`` itself; the gradient of ``one`` (B, N, 1), which is 1 in value, is that of ``out * one``.

    The sum over channels is in the accumulation dtype, and nothing but ``out`` is kept.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, one: Tensor) -> Tensor:
        ctx.save_for_backward(out, one)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, one = ctx.saved_tensors
        done = (grad.to(one.dtype) * out.to(one.dtype)).sum(-1, keepdim=True)
        return grad * one.to(grad.dtype) if torch.is_grad_enabled() else grad, done


def straight_through(out: Tensor, logits: Tensor, index: Tensor) -> Tensor:
    """``out`` (B, N, e), with a gradient to the ``logits`` (B, N, n_P) of the router that chose index (B, N) int64."""
    with no_autocast(out.device):
        one = reference.straight_through_one(logits, index)
        return (out * one).to(out.dtype) if takes_plain_path(out, one) else StraightThrough.apply(out, one)


def plan(index: Tensor, num_projectors: int) -> Sequence[Tensor]:
    """What :func:`project` is told for each side of index (sides, B, N): its choices (B, N)."""
    return index.unbind()


def project(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """Eq. 2: x (B, N, d), weight (n_P, d, e), index (B, N) int64 -> (B, N, e) in the dtype of x."""
    with no_autocast(x.device):
        if is_transformed() or x.is_meta or weight.is_meta:
            return reference.project(x, weight, index)
        if takes_plain_path(x, weight):
            return grouped_projection(x, weight, index)
        return GroupedProjection.apply(x, weight, index)
