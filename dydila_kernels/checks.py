"""Argument checks.  Each raises before any work is done and names the argument, its value and what was expected."""

from __future__ import annotations

import math
import numbers
import operator
import warnings
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from dydila_kernels.types import Grid, Grids, RotaryTables, Video

NORMALIZATIONS = ("length", "none", "denominator")
ROUTER_GRADIENTS = ("none", "straight_through")
DIFFERENTIALS = ("token", "map", "off")
BACKENDS = ("auto", "triton", "torch")
PAIRINGS = ("interleaved", "halves")
BRANCHES = ("3x3", "1x3", "3x1", "1x1", "identity")
MOST_PREFIX_TOKENS = 16
"""So many tokens beyond a square are taken for prefix tokens in the words of an error."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class CheckedArgs(NamedTuple):
    """The arguments of a call after the checks; ``x`` is zero where the mask has no token."""

    x: Tensor
    mask: Tensor | None
    grids: Grids
    cu_seqlens: list[int] | None
    rotary: RotaryTables | None = None
    rotary_pairing: str = "interleaved"

    def visible(self, y: Tensor) -> Tensor:
        """y (B, N, ...) with zeros where the mask has no token."""
        return y if self.mask is None else y.masked_fill(~self.mask[..., None], 0)


def not_traced() -> None:
    """torch.jit.trace turns every number that Python sees into a constant: the routing, and with it the output."""
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace is not supported: it would record the routing of the example tokens as constants; "
            "use torch.export.export"
        )


def choice(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def integer(name: str, value: Any, minimum: int) -> int:
    """The value as an int, of whatever integer type it is (numpy's too), or as the symbol that it is."""
    if not isinstance(value, (int, torch.SymInt)):
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be an int; got {type(value).__name__} {value!r}") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int; got bool {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value}")
    return value


def boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {type(value).__name__} {value!r}")


def number(name: str, value: object, *, above: float = -math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {type(value).__name__} {value!r}")
    if not math.isfinite(value) or value <= above:
        bound = "" if above == -math.inf else f" greater than {above:g}"
        raise ValueError(f"{name} must be a finite number{bound}; got {value}")


def heads(dim: int, num_heads: Any, dim_name: str = "dim") -> int:
    num_heads = integer("num_heads", num_heads, 1)
    if dim % num_heads:
        raise ValueError(f"{dim_name} must be divisible by num_heads; got {dim_name}={dim}, num_heads={num_heads}")
    return num_heads


def floating(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(f"{name} must be a dense tensor; got a nested one: pack images in one row, with cu_seqlens")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got one of the layout {value.layout}")
    if value.dtype not in DTYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {expected}; got {str(value.dtype).removeprefix('torch.')}")


def tokens(name: str, value: object, dim: int | None = None) -> None:
    """A floating-point (B, N, d) tensor."""
    floating(name, value)
    assert isinstance(value, Tensor)
    if value.dim() != 3:
        raise ValueError(f"{name} must have the shape (B, N, d); got {tuple(value.shape)}")
    if dim is not None and value.shape[-1] != dim:
        raise ValueError(f"{name} must have d = {dim} channels; got shape {tuple(value.shape)}")


def shaped(name: str, value: object, shape: tuple[int, ...], meaning: str) -> None:
    """A floating-point tensor of this shape; ``meaning`` spells it in symbols."""
    floating(name, value)
    assert isinstance(value, Tensor)
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have the shape {meaning} = {shape}; got {tuple(value.shape)}")


def mask(value: object, like: Tensor) -> None:
    """A bool tensor (B, N), True where there is a token."""
    if isinstance(value, Sequence) and len(value) in (2, 3) and all(isinstance(n, int) for n in value):
        raise TypeError(f"mask must be a bool tensor (B, N); got {value!r}, which looks like HW: say HW={value!r}")
    if isinstance(value, Tensor) and (value.is_nested or value.layout != torch.strided):
        raise TypeError(f"mask must be a dense bool tensor (B, N); got one of the layout {value.layout}")
    if not isinstance(value, Tensor):
        raise TypeError(f"mask must be a bool tensor (B, N); got {type(value).__name__}")
    if value.dtype != torch.bool:
        found = f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
        if value.dim() == 3:
            raise TypeError(
                "mask, the second argument, must be a bool tensor (B, N): the layer is called with one tensor x and "
                f"makes queries, keys and values of it; got {found}"
            )
        raise TypeError(f"mask must be bool, True for a token that counts; got {found}")
    if value.shape != like.shape[:2]:
        raise ValueError(f"mask must have the shape (B, N) = {tuple(like.shape[:2])}; got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"mask must be on {like.device} as the tokens are; got {value.device}")


def cu_seqlens(value: Tensor | Sequence[int], like: Tensor) -> list[int]:
    """The bounds 0 = c_0 <= c_1 <= ... <= c_S = N of the images packed in the one row of (1, N, d) tokens, as ints."""
    if isinstance(value, Tensor) and (value.dim() != 1 or value.dtype not in (torch.int32, torch.int64)):
        raise TypeError(
            "cu_seqlens must be a one-dimensional int32 or int64 tensor, or a list of ints; "
            f"got {str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
        )
    listed = as_list(value)
    if listed is None:
        raise TypeError(f"cu_seqlens must be a one-dimensional integer tensor or a list of ints; got {value!r}")
    bounds = [integer("cu_seqlens", bound, 0) for bound in listed]
    batch, length = like.shape[:2]
    if batch != 1:
        raise ValueError(f"cu_seqlens packs images in one row, so the batch size must be 1; got {batch}")
    if (
        len(bounds) < 2
        or bounds[0] != 0
        or bounds[-1] != length
        or any(a > b for a, b in zip(bounds[:-1], bounds[1:], strict=True))
    ):
        raise ValueError(f"cu_seqlens must rise from 0 to N = {length}; got {bounds}")
    return bounds


def grid(value: object, length: int, num_prefix_tokens: int, where: str = "") -> tuple[int, ...]:
    """HW as (rows, columns) or (frames, rows, columns) of the tokens after the prefix tokens; None means a square."""
    count = length - num_prefix_tokens
    prefix = f" after {num_prefix_tokens} prefix tokens" if num_prefix_tokens else ""
    if count < 0:
        raise ValueError(
            f"x must hold at least num_prefix_tokens = {num_prefix_tokens} tokens{where}; got N = {length}"
        )
    if value is None:
        side = torch.sym_int(count**0.5)  # as math.isqrt, which torch.compile cannot trace for a dynamic N
        if side * side != count:
            hint = ""
            if not num_prefix_tokens and 0 < count - side * side <= MOST_PREFIX_TOKENS:
                extra = count - side * side
                hint = f"; {side} x {side} and {extra} class or register tokens need num_prefix_tokens={extra}"
            raise ValueError(f"HW=(rows, columns) is needed where N is no square; got N = {count}{prefix}{where}{hint}")
        return side, side
    found = sides(value, 0, where)
    product = found[-2] * found[-1] if len(found) == 2 else found[0] * found[1] * found[2]
    if product != count:
        listed = " x ".join(map(str, found))
        raise ValueError(f"HW must multiply to N = {count}{prefix}{where}; got {listed} = {product}")
    return found


def sides(value: Any, minimum: int, where: str = "") -> tuple[int, ...]:
    """HW as two or three integers, from a tuple, a list, a torch.Size, an array or a tensor."""
    listed = as_list(value)
    if listed is None or len(listed) not in (2, 3):
        raise TypeError(f"HW must be (rows, columns), or (frames, rows, columns) of a video{where}; got {value!r}")
    return tuple(integer(f"HW[{i}]", side, minimum) for i, side in enumerate(listed))


def as_list(value: Any) -> list[Any] | None:
    """The items of a sequence, an array or a tensor; None where there is no such order."""
    if hasattr(value, "tolist") and not isinstance(value, torch.Size):
        value = value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)) else None


def grids(HW: Any, length: int, bounds: Sequence[int] | None, num_prefix_tokens: int) -> list[Grid | Video]:
    """The grid of the image, or of each of the images packed between ``bounds``, after its prefix tokens."""

    def located(start: int, sides: tuple[int, ...]) -> Grid | Video:
        return Grid(start, *sides) if len(sides) == 2 else Video(start, *sides)

    if bounds is None:
        return [located(num_prefix_tokens, grid(HW, length, num_prefix_tokens))]
    count = len(bounds) - 1
    listed = None if HW is None else as_list(HW)
    if HW is not None and (listed is None or len(listed) != count or any(isinstance(g, int) for g in listed)):
        raise ValueError(
            f"HW must be a list of {count} (rows, columns) or (frames, rows, columns), one for each image of "
            f"cu_seqlens; got {HW!r}"
        )
    found = []
    for i, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        sides = grid(None if listed is None else listed[i], stop - start, num_prefix_tokens, f" in image {i}")
        found.append(located(start + num_prefix_tokens, sides))
    return found


def rotary(value: Any, pairing: object, like: Tensor, num_heads: int) -> RotaryTables | None:
    """cos and sin (B, N, e) from (N, e) or (B, N, e) each, or from a complex cos + i sin (N, e/2) or (B, N, e/2)."""
    choice("rotary_pairing", pairing, PAIRINGS)
    if value is None:
        return None
    batch, length, channels = *like.shape[:2], like.shape[2] // num_heads
    if channels % 2:
        raise ValueError(f"rotary turns pairs of channels, but a head has an odd number of them, d/H = {channels}")
    if isinstance(value, Tensor) and value.is_complex():
        if value.shape[-1:] != (channels // 2,):
            raise ValueError(
                f"rotary must have the shape (N, d/H/2) or (B, N, d/H/2) where it is complex, with d/H/2 = "
                f"{channels // 2}; got {tuple(value.shape)}"
            )
        parts = (value.real, value.imag)
        value = [torch.cat([t, t], -1) if pairing == "halves" else t.repeat_interleave(2, -1) for t in parts]
    if isinstance(value, Tensor) or not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f"rotary must be (cos, sin) or a complex tensor; got {type(value).__name__}")
    for i, t in enumerate(value):
        floating(f"rotary[{i}]", t)
        images = t.shape[0] if t.dim() == 3 else 1
        if t.dim() not in (2, 3) or t.shape[-2:] != (length, channels) or images not in (1, batch):
            raise ValueError(
                f"rotary[{i}] must have the shape (N, d/H) = {(length, channels)} or (B, N, d/H) = "
                f"{(batch, length, channels)}; got {tuple(t.shape)}"
            )
        if t.device != like.device:
            raise ValueError(f"rotary[{i}] must be on {like.device} as the tokens are; got {t.device}")
    cos, sin = (t.expand(batch, length, channels) for t in value)
    return cos, sin


def branches(name: str, value: object) -> None:
    """Different names of convolution branches, at least one with a kernel, or none at all."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a tuple of branch names; got {value!r}")
    for branch in value:
        choice(name, branch, BRANCHES)
    if len(set(value)) != len(value):
        raise ValueError(f"{name} must not repeat a branch; got {value!r}")
    if set(value) == {"identity"}:
        raise ValueError(f"{name} must hold a branch with a kernel beside 'identity'; got {value!r}")


def vector(name: str, value: object, length: str) -> None:
    """A floating-point tensor of one dimension with at least one entry."""
    floating(name, value)
    assert isinstance(value, Tensor)
    if value.dim() != 1 or not len(value):
        raise ValueError(f"{name} must have the shape ({length},) with {length} >= 1; got {tuple(value.shape)}")


def same(attribute: str, tensors: Mapping[str, Tensor | None]) -> None:
    """All tensors agree in their "dtype" or "device"."""
    if len({getattr(t, attribute) for t in tensors.values() if t is not None}) > 1:
        found = {name: getattr(t, attribute) for name, t in tensors.items() if t is not None}
        listed = ", ".join(f"{name} {str(value).removeprefix('torch.')}" for name, value in found.items())
        raise ValueError(f"{', '.join(found)} must share one {attribute}; got {listed}")


def weights(name: str, value: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """All that is wanted and nothing else, in its shapes.  A wrong shape is a RuntimeError, as it is torch's."""
    missing, unexpected = sorted(wanted.keys() - value.keys()), sorted(value.keys() - wanted.keys())
    if missing or unexpected:
        raise ValueError(
            f"{name} must hold exactly {', '.join(sorted(wanted))}; "
            f"it lacks {', '.join(missing) or 'nothing'} and has beside them {', '.join(unexpected) or 'nothing'}"
        )
    for key in sorted(wanted):
        floating(f"{name}[{key!r}]", value[key])
        if value[key].shape != wanted[key].shape:
            raise RuntimeError(
                f"size mismatch for {key}: it must have the shape {tuple(wanted[key].shape)}; "
                f"got {tuple(value[key].shape)}"
            )


def warn_of_mask_beside_packing(mask: Tensor | None) -> None:
    """``cu_seqlens`` says which tokens there are; a mask beside it is dropped, and that is said."""
    if mask is not None:
        warnings.warn("mask is ignored where cu_seqlens is given: packed rows hold no padding", stacklevel=4)


EXPLAINED = {
    "key": "the layer makes queries, keys and values of x",
    "value": "the layer makes queries, keys and values of x",
    "key_padding_mask": "say mask, True for a token that counts: mask=~key_padding_mask",
    "need_weights": "there is no matrix of weights, and the output is one tensor",
    "average_attn_weights": "there is no matrix of weights, and the output is one tensor",
    "rope": "say rotary=(cos, sin)",
    "image_rotary_emb": "DyDiLAttention has rotary=(cos, sin), which rotates after the kernel",
    "rotary_emb": "DyDiLAttention has rotary=(cos, sin), which rotates after the kernel",
    "encoder_hidden_states": "the layer attends to its own tokens alone",
}
"""Why a layer has no use for arguments that others take."""


def mask_of(mask: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
    """The mask under either of its names."""
    if mask is not None and attn_mask is not None:
        raise ValueError("attn_mask is another name for mask; got both")
    return attn_mask if mask is None else mask


def unused(arguments: Mapping[str, object], is_causal: bool) -> None:
    """Arguments by name that are not the layer's: None, or False for a matrix of weights, asks for nothing."""
    for name, value in arguments.items():
        if value is not None and not (name in ("need_weights", "average_attn_weights") and value is False):
            reason = EXPLAINED.get(name, "DyDiLAttention has no such argument")
            raise TypeError(f"{name} must be None: {reason}; got {type(value).__name__}")
    if is_causal:
        raise ValueError("is_causal must be False: DyDiLA is bidirectional; got True")


def is_replaced(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module's ``forward`` is not that of its ``kind``, as FSDP's subclasses have it: some tools put
    another in its place."""
    return "forward" in module.__dict__ or type(module).forward is not kind.forward


CALL = nn.Module.__call__
FORWARDS: dict[type[nn.Module], Any] = {nn.Linear: nn.Linear.forward}
"""As torch has them; some tools put others in their place, for all modules."""

GLOBAL_HOOKS = (
    modules._global_forward_pre_hooks,
    modules._global_forward_hooks,
    modules._global_backward_pre_hooks,
    modules._global_backward_hooks,
)
"""Of all modules.  Torch fills and empties these tables; 2.6 has no function that asks for all of them."""


PLAIN = frozenset((nn.Parameter, Tensor, type(None)))
"""Types of parameters that are nothing but their numbers."""


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module does what ``kind.forward`` does with its parameters, and nothing else.

    Not so for subclasses, hooks of any kind, replaced forwards, and parameters that are no plain tensors.
    """
    if type(module) is not kind or kind.forward is not FORWARDS.get(kind, kind.forward):
        return False
    if nn.Module.__call__ is not CALL or module._compiled_call_impl is not None or any(GLOBAL_HOOKS):
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    if "forward" in module.__dict__:
        return False
    # (The Dynamo of torch 2.6 cannot list a module's attributes.)
    if not torch.compiler.is_compiling() and any(map(isinstance, module.__dict__.values(), repeat(Tensor))):
        return False
    return PLAIN.issuperset(map(type, module._parameters.values()))


def outliving(module: nn.Module, parameter: Tensor) -> Tensor:
    """The parameter, for use after the module's call: a copy where hooks may take its memory away, as FSDP's do."""
    return parameter if is_plain(module, type(module)) else parameter.clone()
