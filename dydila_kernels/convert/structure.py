"""What a model is made of: its attention layers, which of them can be swapped, and where its patches are made.

Everything is recognised by its structure, so neither timm nor diffusers is imported.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from dydila_kernels import checks
from dydila_kernels.attention import DyDiLAttention
from dydila_kernels.convert.layers import DiffusersAttention, ReplacedAttention, VisionAttention

WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "OptimizedModule",
            "ScriptModule", "GraphModule"}  # fmt: skip
"""Classes of models that hold on to their layers, by name, so that none has to be imported."""

PROCESSORS = {"AttnProcessor", "AttnProcessor2_0", "AttnProcessorNPU", "SanaAttnProcessor2_0",
              "SanaLinearAttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor"}  # fmt: skip
"""Processors of diffusers that are attention and no more."""

FLAGS = ("is_causal", "causal", "window_size", "rope", "use_rope", "rel_pos", "use_rel_pos", "residual_connection")
"""Attributes that, where set, make an attention more than its projections show."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Selection = str | int | Sequence[str | int]


class Weights(NamedTuple):
    """What the new layer takes from the old one."""

    replacement: type[ReplacedAttention]
    qkv: Sequence[nn.Linear]  # one (3d, d), or those of Q, K and V
    proj: nn.Linear
    num_heads: int
    proj_drop: float


@dataclass
class Found:
    """An attention layer under all of its names in the model: its weights, or the reason why it stays."""

    names: list[str]
    layer: nn.Module
    weights: Weights | None = None
    reason: str | None = None


class Unfit(Exception):
    """Says why a layer cannot be swapped."""


def require_plain(model: nn.Module) -> None:
    for name, module in model.named_modules():
        wrapper = next((c.__name__ for c in type(module).__mro__ if c.__name__ in WRAPPERS), None)
        if wrapper is not None:
            raise ValueError(
                f"model must be neither wrapped nor compiled, which comes after the swap; "
                f"{name or 'model'} is a {wrapper}"
            )


def find_attention(model: nn.Module) -> list[Found]:
    """Every module of the model that is, or by its name may be, attention, outermost first."""
    found: dict[int, Found] = {}
    taken: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(f"{outer}.") for outer in taken) or not looks_like_attention(module):
            continue
        taken.append(name)
        found.setdefault(id(module), Found([], module)).names.append(name)
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for a in found.values():
        try:
            if "" in a.names:
                raise Unfit("it is the model itself, which has no place to put another layer in")
            a.weights = read(a.layer, owners)
        except Unfit as unfit:
            a.reason = str(unfit)
    return list(found.values())


def looks_like_attention(module: nn.Module) -> bool:
    def has_projections(m: nn.Module) -> bool:
        return isinstance(m, DyDiLAttention) or any(isinstance(getattr(m, n, None), nn.Module) for n in ("qkv", "to_q"))

    if has_projections(module):
        return True
    name = type(module).__name__.lower()
    return ("attention" in name or "attn" in name) and not any(map(has_projections, module.modules()))


def read(layer: nn.Module, owners: Counter[int]) -> Weights:
    """The weights of a layer that DyDiLAttention can stand for; raises Unfit for any other."""
    if isinstance(layer, DyDiLAttention):
        raise Unfit("it is a DyDiLAttention already")
    if isinstance(getattr(layer, "to_q", None), nn.Module):
        weights = read_diffusers(layer)
    elif isinstance(getattr(layer, "qkv", None), nn.Module):
        weights = read_vision(layer)
    else:
        raise Unfit("it has neither qkv and proj nor to_q, to_k, to_v and to_out")
    require_no_more(layer)
    require_linears(weights, owners)
    return weights


def read_vision(layer: nn.Module) -> Weights:
    require_children(layer, {"qkv", "proj", "attn_drop", "proj_drop"})
    _, *further = inspect.signature(layer.forward).parameters
    require_arguments(further, {"attn_mask", "attn_bias", "is_causal"})
    if dropout(layer, "attn_drop"):
        raise Unfit(f"attn_drop = {dropout(layer, 'attn_drop')} would be lost: DyDiLA has no scores to drop")
    return Weights(
        VisionAttention,
        [child(layer, "qkv")],
        child(layer, "proj"),
        heads(layer, "num_heads"),
        dropout(layer, "proj_drop"),
    )


def read_diffusers(layer: nn.Module) -> Weights:
    if getattr(layer, "is_cross_attention", False):
        raise Unfit("it is cross-attention")
    require_children(layer, {"to_q", "to_k", "to_v", "to_out"})
    arguments = inspect.signature(layer.forward).parameters
    require_arguments(arguments, {"hidden_states", "encoder_hidden_states", "attention_mask", "cross_attention_kwargs"})
    processor = type(getattr(layer, "processor", None)).__name__
    if processor not in PROCESSORS:
        raise Unfit(f"its processor {processor} may do more than attention")
    if getattr(layer, "rescale_output_factor", 1) != 1:
        raise Unfit(f"rescale_output_factor = {layer.rescale_output_factor} would be lost")
    out = list(getattr(layer, "to_out", None) or [])
    if len(out) != 2 or not isinstance(out[1], nn.Dropout):
        raise Unfit("to_out is not a projection and a dropout")
    return Weights(
        DiffusersAttention, [child(layer, f"to_{n}") for n in "qkv"], out[0], heads(layer, "heads"), float(out[1].p)
    )


def require_children(layer: nn.Module, known: set[str]) -> None:
    for name, module in layer.named_children():
        if name not in known and not isinstance(module, nn.Identity):
            raise Unfit(f"{name} ({type(module).__name__}) would be lost")


def require_arguments(names: Iterable[str], known: set[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise Unfit(f"its forward takes {', '.join(unknown)}")


def child(layer: nn.Module, name: str) -> nn.Linear:
    module = getattr(layer, name, None)
    if not isinstance(module, nn.Linear):
        raise Unfit(f"{name} is not an nn.Linear")
    return module


def heads(layer: nn.Module, name: str) -> int:
    number = getattr(layer, name, None)
    if not isinstance(number, int):
        raise Unfit(f"it has no {name}")
    return number


def dropout(layer: nn.Module, name: str) -> float:
    rate = getattr(layer, name, 0.0)
    if isinstance(rate, nn.Module) and not isinstance(rate, nn.Dropout | nn.Identity):
        raise Unfit(f"{name} ({type(rate).__name__}) would be lost")
    return float(getattr(rate, "p", 0.0) if isinstance(rate, nn.Module) else rate)


def require_no_more(layer: nn.Module) -> None:
    """Nothing beside the projections that the new layer would lack."""
    for name in [*layer._parameters, *layer._buffers]:
        if getattr(layer, name) is not None:
            raise Unfit(f"{name} would be lost")
    for name in FLAGS:
        if getattr(layer, name, None) not in (None, False):
            raise Unfit(f"{name} = {getattr(layer, name)} would be lost")
    for module in layer.modules():
        if any(getattr(module, hooks) for hooks in HOOKS) or any(p._backward_hooks for p in module.parameters()):
            raise Unfit("its hooks would be lost")
        if "forward" in vars(module) or module._compiled_call_impl is not None:
            raise Unfit("its forward was replaced or compiled")


def require_linears(weights: Weights, owners: Counter[int]) -> None:
    """qkv (3d, d) or three of (d, d), and proj (d, d), of one kind, used nowhere else."""
    linears = [*weights.qkv, weights.proj]
    dim = weights.proj.out_features
    shapes = [(3 * dim if len(weights.qkv) == 1 else dim, dim)] * len(weights.qkv) + [(dim, dim)]
    for linear, shape in zip(linears, shapes, strict=True):
        if not checks.is_plain(linear, nn.Linear):
            raise Unfit(f"a projection is a {type(linear).__name__} of a {type(linear.weight).__name__}, not plain")
        if tuple(linear.weight.shape) != shape:
            raise Unfit(f"a projection has the shape {tuple(linear.weight.shape)}, not {shape}")
    parameters = [p for linear in linears for p in linear.parameters()]
    if dim % weights.num_heads:
        raise Unfit(f"d = {dim} is not divisible by its {weights.num_heads} heads")
    if any(owners[id(p)] > 1 for p in parameters):
        raise Unfit("it shares weights with another layer")
    if len({(p.dtype, p.device) for p in parameters}) > 1 or parameters[0].dtype not in checks.DTYPES:
        raise Unfit("its weights are not of one floating dtype on one device")
    if len({(linear.weight.requires_grad, linear.bias is None or linear.bias.requires_grad, linear.bias is None)
            for linear in weights.qkv}) > 1:  # fmt: skip
        raise Unfit("its query, key and value projections differ in bias or requires_grad")


def select(found: Sequence[Found], include: Selection | None, exclude: Selection) -> None:
    """Gives the layers that the caller does not want swapped a reason to stay."""
    fit = [a for a in found if a.reason is None]
    included = None if include is None else chosen_by("include", include, found, fit)
    excluded = chosen_by("exclude", exclude, found, fit)
    for a in fit:
        if included is not None and id(a) not in included:
            a.reason = "the caller did not include it"
        elif id(a) in excluded:
            a.reason = "the caller excluded it"


def chosen_by(argument: str, selection: Selection, found: Sequence[Found], fit: Sequence[Found]) -> set[int]:
    """The layers, by id, that the names, globs and indices of the caller stand for; each must stand for one or more."""
    chosen: set[int] = set()
    for item in [selection] if isinstance(selection, str | int) else selection:
        if isinstance(item, bool) or not isinstance(item, str | int):
            raise TypeError(f"{argument} must hold names, globs and indices; got {type(item).__name__} {item!r}")
        if isinstance(item, int):
            if not -len(fit) <= item < len(fit):
                raise ValueError(f"{argument} has the index {item}, but {len(fit)} layers can be swapped")
            matched = [fit[item]]
        else:
            matched = [a for a in found if any(fnmatchcase(n, item) for name in a.names for n in with_ancestors(name))]
            if not matched:
                names = ", ".join(name for a in found for name in a.names) or "none"
                raise ValueError(f"{argument} has {item!r}, which matches no attention layer; there are: {names}")
        chosen.update(map(id, matched))
    return chosen


def with_ancestors(name: str) -> list[str]:
    """ "a.b.c" -> "a", "a.b" and "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def find_patches(model: nn.Module, found: Sequence[Found], dims: set[int]) -> tuple[str, nn.Conv2d] | None:
    """The one convolution outside of the blocks that turns an image into patches of d channels."""
    blocks = {name.rpartition(".")[0] for a in found for name in a.names} - {""}
    patches = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and module.out_channels in dims
        and module.kernel_size == module.stride
        and not any(name.startswith(f"{block}.") for block in blocks)
    ]
    return patches[0] if len(patches) == 1 else None


def prefix_tokens(model: nn.Module, name: str) -> int:
    """``num_prefix_tokens`` of the nearest module around the layer that has it, 0 where none does."""
    for outer in [*reversed(with_ancestors(name)[:-1]), ""]:
        number = getattr(model.get_submodule(outer), "num_prefix_tokens", None)
        if isinstance(number, int):
            return number
    return 0


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)
