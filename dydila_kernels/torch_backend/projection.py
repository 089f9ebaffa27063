"""Eqs. 1-2: each token times its projector.  x (B, N, d), weight (n_P, d, d), index (B, N) -> (B, N, d).

A block of tokens is sorted by projector, multiplied group by group and put back, so the work is that of one
projection whatever n_P is, and a projector without a token costs nothing and gets a zero gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dydila_kernels import reference
from dydila_kernels.torch_backend.blocks import (
    accumulation_dtype,
    all_blocks,
    differentiable_gradients,
    no_autocast,
    router_logits,
    scratch,
    takes_plain_path,
)


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


def sorted_rows(index: Tensor, choices: int) -> tuple[Tensor, list[int]]:
    """The rows of a block, index (m,), in the order of their projectors, and how many each projector has."""
    return index.argsort(stable=True), index.bincount(minlength=choices).tolist()


def groups(index: Tensor, choices: int) -> Iterator[tuple[int, Tensor]]:
    """The rows of a block, index (m,), that were routed to each projector that has any."""
    order, counts = sorted_rows(index, choices)
    for u, rows in enumerate(order.split(counts)):
        if len(rows):
            yield u, rows


def project_block(out: Tensor, x: Tensor, weight: Tensor, index: Tensor) -> None:
    """Writes Eq. 2 for a block of tokens x (b, n, d), routed by index (b, n), into the contiguous ``out`` (b, n, d)."""
    order, counts = sorted_rows(index.flatten(), len(weight))
    target = out.view(-1, out.shape[-1])
    sources = torch.index_select(x.flatten(0, 1), 0, order, out=target)
    products = scratch.take("product", target.shape, out.dtype, out.device)
    for w, source, product in zip(weight, sources.split(counts), products.split(counts), strict=True):
        torch.mm(source, w, out=product)
    # (On a CPU twice as fast as index_copy_.)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    torch.index_select(products, 0, places, out=target)


class RoutedProjection(torch.autograd.Function):
    """Eq. 2 and its gradients.  ``one`` (B, N, 1), or None, is the straight-through factor: it is 1 in value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, index: Tensor, one: Tensor | None) -> Tensor:
        out = x.new_empty((*x.shape[:2], weight.shape[-1]))
        for images, ranges in all_blocks(x):
            for rows in ranges:
                project_block(out[images, rows], x[images, rows], weight, index[images, rows])
        ctx.save_for_backward(x, weight, index, one, None if one is None else out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, index, one, out = ctx.saved_tensors
        need_x, need_weight, _, need_one = ctx.needs_input_grad
        if torch.is_grad_enabled():

            def plain(x: Tensor, weight: Tensor, one: Tensor | None) -> Tensor:
                return plain_projection(x, weight, index, one)

            needed = (need_x, need_weight, need_one)
            dx, dweight, done = differentiable_gradients(plain, (x, weight, one), needed, grad)
            return dx, dweight, None, done

        dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_x else None
        total = torch.zeros_like(weight, dtype=accumulation_dtype(weight.dtype)) if need_weight else None
        done = torch.empty_like(one) if need_one else None
        with no_autocast(grad.device):
            for images, ranges in all_blocks(x):
                for rows in ranges:
                    block, g = x[images, rows].flatten(0, 1), grad[images, rows].flatten(0, 1)
                    for u, members in groups(index[images, rows].flatten(), len(weight)):
                        x_u, g_u = block.index_select(0, members), g.index_select(0, members)
                        if dx is not None:
                            dx[images, rows].view(-1, x.shape[-1]).index_copy_(0, members, g_u @ weight[u].T)
                        if total is not None:
                            total[u].addmm_(x_u.to(total.dtype).T, g_u.to(total.dtype))
                    if done is not None:
                        product = grad[images, rows].to(done.dtype) * out[images, rows].to(done.dtype)
                        done[images, rows] = product.sum(-1, keepdim=True)
        return dx, None if total is None else total.to(weight.dtype), None, done


def plain_projection(x: Tensor, weight: Tensor, index: Tensor, one: Tensor | None) -> Tensor:
    """The reference equation: every projector on every token, then the choice."""
    out = reference.project(x, weight, index.long())
    return out if one is None else (out * one).to(out.dtype)


def routed_projection(x: Tensor, weight: Tensor, index: Tensor, logits: Tensor | None = None) -> Tensor:
    """Eq. 2; with ``logits`` (B, N, n_P) their gradient is the straight-through one, and the value the same."""
    one = None if logits is None else reference.straight_through_one(logits, index)
    with no_autocast(x.device):
        if takes_plain_path(x, weight, one):
            return plain_projection(x, weight, index, one)
        return RoutedProjection.apply(x, weight, index, one)
