"""The layer, block by block: called at once, or through operators, which are what ``torch.compile`` sees on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dydila_kernels.precision import accumulation_dtype
from dydila_kernels.torch_backend.backward import is_explicit
from dydila_kernels.torch_backend.blockwise import decision_dtype, state_elements
from dydila_kernels.torch_backend.layer import without_gradients
from dydila_kernels.torch_backend.layer_gradients import (
    Call,
    Layer,
    LayerTensors,
    Saved,
    backward_of,
    forward,
    kept_tokens,
)
from dydila_kernels.types import LayerWeights, Options, Video, decision_names

TENSORS = """
    Tensor x, Tensor qkv, Tensor? qkv_bias, Tensor proj, Tensor? proj_bias, Tensor? projector_q, Tensor? projector_k,
    Tensor? router_q, Tensor? router_k, Tensor gamma, Tensor? lam, Tensor kernel_routers, Tensor? differential_routers,
    Tensor? kernel, Tensor? kernel_bias"""
CALL = """
    Tensor? mask, Tensor? cos, Tensor? sin, int num_heads, str normalization, str router_gradient, str differential,
    str rotary_pairing, SymInt[]? cu_seqlens, SymInt[] grids"""
FIELDS = len(LayerTensors._fields)


def flat(call: Call) -> tuple[Any, ...]:
    """The arguments of the operators that say what a call is."""
    options = call.options
    # The frames of a video are not told apart, so that one graph serves any number of them.
    videos = (grid if isinstance(grid, Video) else Video(grid.start, 1, *grid[1:]) for grid in call.grids)
    numbers = [number for video in videos for number in video]
    chosen = (*options[:4], options.rotary_pairing)
    return call.mask, *(options.rotary or (None, None)), *chosen, call.cu_seqlens, numbers


def call_of(
    mask: Tensor | None, cos: Tensor | None, sin: Tensor | None, num_heads: int, normalization: str,
    router_gradient: str, differential: str, pairing: str, cu_seqlens: Sequence[int] | None, numbers: Sequence[int],
) -> Call:  # fmt: skip
    rotary = None if cos is None or sin is None else (cos, sin)
    options = Options(num_heads, normalization, router_gradient, differential, rotary, pairing)
    grids = [Video(*numbers[i : i + 4]) for i in range(0, len(numbers), 4)]
    return Call(options, mask, cu_seqlens, grids)


def parsed(arguments: Sequence[Any]) -> tuple[LayerTensors, Call]:
    """The arguments of an operator."""
    return LayerTensors(*arguments[:FIELDS]), call_of(*arguments[FIELDS:])


@torch.library.custom_op("dydila_kernels::layer_inference", mutates_args=(), schema=f"({TENSORS}, {CALL}) -> Tensor")
def layer_inference(*arguments: Any) -> Tensor:
    given, call = parsed(arguments)
    return without_gradients(given.x, given.weights(call.grids), call.options, call.mask, call.cu_seqlens)


@layer_inference.register_fake
def _(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("dydila_kernels::layer", mutates_args=(), schema=f"({TENSORS}, {CALL}) -> Tensor[]")
def layer_operator(*arguments: Any) -> list[Tensor]:
    """The output, and what is saved for the backward pass."""
    given, call = parsed(arguments)
    *tensors, states = forward(call, given)
    return [*tensors, F.pad(states, (0, most_states(given.x, call) - len(states)))]


def most_states(x: Tensor, call: Call) -> int:
    """Elements of the states of all images, with those that are so short that they have none: a size that does not
    depend on how many those are."""
    images = x.shape[0] if call.cu_seqlens is None else len(call.cu_seqlens) - 1
    return images * state_elements(call.options, x.shape[-1])


@layer_operator.register_fake
def _(*arguments: Any) -> list[Tensor]:
    given, call = parsed(arguments)
    x = given.x
    wholes = [x.new_empty(x.shape) for _ in range(1 + kept_tokens(call, given) + 1)]
    choices = [] if given.projector_q is None else [x.new_empty((2, *x.shape[:2]), dtype=torch.int64)]
    dtype = decision_dtype(given.kernel_routers, given.differential_routers)
    decisions = [x.new_empty(x.shape[:2], dtype=dtype) for _ in decision_names(call.options.differential)]
    return [*wholes, *choices, *decisions, x.new_empty(most_states(x, call))]


@torch.library.custom_op(
    "dydila_kernels::layer_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor[] saved, bool[] needed, {TENSORS}, {CALL}) -> Tensor[]",
)
def layer_backward(grad: Tensor, saved: Sequence[Tensor], needed: Sequence[bool], *arguments: Any) -> list[Tensor]:
    """The gradients of the tensors that are needed."""
    given, call = parsed(arguments)
    found = backward_of(call, given, needed, Saved.of(call, given, saved), grad)
    return [t for t in found if t is not None]


@layer_backward.register_fake
def _(grad: Tensor, saved: Sequence[Tensor], needed: Sequence[bool], *arguments: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip(arguments[:FIELDS], needed, strict=True) if need]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, (mask, cos, sin, *rest) = inputs[:FIELDS], inputs[FIELDS:]
    ctx.rest = rest
    ctx.save_for_backward(*tensors, mask, cos, sin, *output[1:])


def _differentiate(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors  # which checkpointing gives out once
    arguments, saved = tensors[: FIELDS + 3], tensors[FIELDS + 3 :]
    needed = [bool(need) for need in ctx.needs_input_grad[:FIELDS]]
    found = iter(layer_backward(grads[0], saved, needed, *arguments, *ctx.rest))
    return *(next(found) if need else None for need in needed), *(None,) * (3 + len(ctx.rest))


torch.library.register_autograd(layer_operator, _differentiate, setup_context=_save)


def layer(
    x: Tensor, weights: LayerWeights, options: Options, mask: Tensor | None, cu_seqlens: Sequence[int] | None
) -> Tensor:
    """Eqs. 1-9 and the output projection for validated arguments: (B, N, d), contiguous.

    x (B, N, d), in the dtype of the weights and zero where the mask has no token.  Gradients are to be asked for only
    where :func:`differentiates`.
    """
    given = LayerTensors.of(x, weights)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    if differentiated:
        given = LayerTensors._make(None if t is None else t.to(x.dtype) for t in given)
    grids = [] if weights.convolution is None else weights.convolution.grids
    call = Call(options, mask, cu_seqlens, grids)
    if torch.compiler.is_compiling():
        return layer_operator(*given, *flat(call))[0] if differentiated else layer_inference(*given, *flat(call))
    if differentiated:
        return Layer.apply(call, *given)
    return without_gradients(x, weights, options, mask, cu_seqlens)


def differentiates(x: Tensor, options: Options) -> bool:
    """Whether :func:`layer` has all gradients that may be asked for: not those of norms, routers and rotary tables, and
    not in a dtype in which those of the weights cannot be summed over the blocks.  Within an operator there is no
    autograd."""
    exact = x.dtype == accumulation_dtype(x.dtype)
    explicit = not torch.compiler.is_compiling() or is_explicit(options)
    rotated = options.rotary is not None and any(t.requires_grad for t in options.rotary)
    return exact and explicit and options.router_gradient == "none" and not rotated
