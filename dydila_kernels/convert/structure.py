"""What a model is made of: its attention layers, and the reasons why some of them cannot be swapped.

Everything is recognised by its structure, so neither timm nor diffusers is imported.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any, NamedTuple

from torch import Tensor, nn

from dydila_kernels import checks
from dydila_kernels.attention import DyDiLAttention
from dydila_kernels.convert import code
from dydila_kernels.convert.layers import DiffusersAttention, ReplacedAttention, VisionAttention

WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "OptimizedModule",
            "ScriptModule", "GraphModule"}  # fmt: skip
"""Classes of models that hold on to their layers, by name, so that none has to be imported."""

PROCESSORS = {"AttnProcessor", "AttnProcessor2_0", "AttnProcessorNPU", "SanaAttnProcessor2_0",
              "SanaLinearAttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor"}  # fmt: skip
"""Processors of diffusers that are attention and no more."""

ARGUMENTS = {
    VisionAttention: {"attn_mask", "attn_bias", "is_causal"},
    DiffusersAttention: {"hidden_states", "encoder_hidden_states", "attention_mask", "cross_attention_kwargs"},
}
"""What the forward of a layer may take, beside the first argument of timm's, which has several names."""

CHILDREN = {
    VisionAttention: {"qkv", "proj", "attn_drop", "proj_drop"},
    DiffusersAttention: {"to_q", "to_k", "to_v", "to_out"},
}

FLAGS = ("is_causal", "causal", "window_size", "rope", "use_rope", "rel_pos", "use_rel_pos", "residual_connection")
"""Attributes that, where set, make an attention more than its projections show."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

QUERIES = re.compile(r"(to_|w_?|linear_)?(q|qk|qkv|query|query_key_value)(_proj|_linear)?")
"""Names that projections to queries go by."""

ATTENTION = re.compile(r"(\w+_)?(attn|attention|mhsa|msa|mha)\d*")
"""Names that attention layers go by in the module around them."""

OTHER_KINDS = re.compile("channel|window|axial|causal", re.IGNORECASE)
"""What a class has in its name whose attention is not among all tokens, though its projections are those of timm."""

FRAMES = re.compile("temporal|motion|frame", re.IGNORECASE)
NO_IMAGE = re.compile("text|caption|prompt|context|audio", re.IGNORECASE)
"""What is in the name of a layer, or of one around it, whose tokens are not those of an image."""

MORE_TOKENS = {"objs", "kv"}
"""Arguments of blocks that hand their attention further tokens (GLIGEN, Stable Cascade)."""

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
    """An attention layer under all of its names in the model: its weights, or the reasons why it stays."""

    names: list[str]
    layer: nn.Module
    weights: Weights | None = None
    reasons: list[str] = field(default_factory=list)


def require_plain(model: nn.Module) -> None:
    for name, module in model.named_modules():
        wrapper = next((c.__name__ for c in type(module).__mro__ if c.__name__ in WRAPPERS), None)
        if wrapper is not None:
            raise ValueError(
                f"model must be neither wrapped nor compiled, which comes after the swap; "
                f"{name or 'model'} is a {wrapper}"
            )


def find_attention(model: nn.Module) -> list[Found]:
    """Every module of the model that is, or may be, attention, outermost first."""
    found: dict[int, Found] = {}
    taken: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(f"{outer}.") for outer in taken) or not looks_like_attention(name, module):
            continue
        taken.append(name)
        found.setdefault(id(module), Found([], module)).names.append(name)
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for a in found.values():
        a.weights, a.reasons = read(a.layer, owners)
        if "" in a.names:
            a.reasons.append("it is the model itself, which has no place to put another layer in")
        a.reasons += [reason for name in a.names for reason in reasons_around(model, name)]
        a.reasons = list(dict.fromkeys(a.reasons))
    return list(found.values())


def looks_like_attention(name: str, module: nn.Module) -> bool:
    """By its projections; or else by its class, its name or what its code calls, if nothing in it is by these."""
    if has_queries(module):
        return True
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential) or not any(True for _ in module.parameters()):
        return False
    kind = type(module).__name__.lower()
    named = ATTENTION.fullmatch(name.rpartition(".")[2]) and next(module.children(), None) is not None
    if not (named or "attention" in kind or "attn" in kind or code.attends(type(module))):
        return False
    return not any(map(has_queries, module.modules()))


def has_queries(module: nn.Module) -> bool:
    return isinstance(module, DyDiLAttention) or any(QUERIES.fullmatch(name) for name, _ in module.named_children())


def read(layer: nn.Module, owners: Counter[int]) -> tuple[Weights | None, list[str]]:
    """The weights of a layer that DyDiLAttention can stand for, or all reasons why it cannot."""
    if isinstance(layer, DyDiLAttention):
        return None, ["it is a DyDiLAttention already"]
    kind: type[ReplacedAttention]
    if isinstance(getattr(layer, "to_q", None), nn.Module):
        kind, num_heads, proj_drop = DiffusersAttention, getattr(layer, "heads", None), 0.0
        out = list(getattr(layer, "to_out", None) or [])
        projections = {f"to_{n}": getattr(layer, f"to_{n}", None) for n in "qkv"}
        projections["to_out.0"] = out[0] if out else None
        reasons = list(reasons_of_diffusers(layer, out))
        if not reasons:
            proj_drop = float(out[1].p)
    elif isinstance(getattr(layer, "qkv", None), nn.Module):
        kind, num_heads, proj_drop = VisionAttention, getattr(layer, "num_heads", None), dropout(layer, "proj_drop")
        projections = {name: getattr(layer, name, None) for name in ("qkv", "proj")}
        reasons = list(reasons_of_vision(layer))
    else:
        return None, ["it has neither qkv and proj nor to_q, to_k, to_v and to_out"]
    reasons += reasons_of_more(layer, kind)
    linears = [linear for linear in projections.values() if isinstance(linear, nn.Linear)]
    reasons += [f"{name} is not an nn.Linear" for name, p in projections.items() if not isinstance(p, nn.Linear)]
    if isinstance(num_heads, bool) or not isinstance(num_heads, Integral):
        reasons.append(f"it has no {'heads' if kind is DiffusersAttention else 'num_heads'}")
    elif len(linears) == len(projections):
        weights = Weights(kind, linears[:-1], linears[-1], int(num_heads), proj_drop)
        reasons += reasons_of_weights(weights, owners)
        if not reasons:
            return weights, []
    return None, reasons


def reasons_of_vision(layer: nn.Module) -> Iterator[str]:
    if match := OTHER_KINDS.search(type(layer).__name__):
        yield f"by the name of its class its attention is of another kind ({match[0].lower()})"
    for name in ("attn_drop", "proj_drop"):
        module = getattr(layer, name, None)
        if isinstance(module, nn.Module) and not isinstance(module, nn.Dropout | nn.Identity):
            yield f"{name} ({type(module).__name__}) would be lost"
    if dropout(layer, "attn_drop"):
        yield f"attn_drop = {dropout(layer, 'attn_drop')} would be lost: DyDiLA has no scores to drop"


def reasons_of_diffusers(layer: nn.Module, out: Sequence[nn.Module]) -> Iterator[str]:
    if getattr(layer, "is_cross_attention", False):
        yield "it is cross-attention"
    processor = type(getattr(layer, "processor", None)).__name__
    if processor not in PROCESSORS:
        yield f"its processor {processor} may do more than attention"
    if getattr(layer, "rescale_output_factor", 1) != 1:
        yield f"rescale_output_factor = {layer.rescale_output_factor} would be lost"
    if len(out) != 2 or not isinstance(out[1], nn.Dropout):
        yield "to_out is not a projection and a dropout"


def dropout(layer: nn.Module, name: str) -> float:
    rate = getattr(layer, name, 0.0)
    return float(getattr(rate, "p", 0.0) if isinstance(rate, nn.Module) else rate or 0.0)


def reasons_of_more(layer: nn.Module, kind: type[ReplacedAttention]) -> Iterator[str]:
    """Whatever is beside the projections and would be lost."""
    for name, module in layer.named_children():
        if name not in CHILDREN[kind] and not isinstance(module, nn.Identity):
            yield f"{name} ({type(module).__name__}) would be lost"
    first, *further = inspect.signature(layer.forward).parameters or [""]
    if unknown := [name for name in further if name not in ARGUMENTS[kind]]:
        yield f"its forward takes {', '.join(unknown)}"
    if code.dims_of_argument(type(layer).forward, first) - {3}:
        yield f"it takes tokens of other than 3 dimensions: its forward unpacks the shape of {first} otherwise"
    for name in [*layer._parameters, *layer._buffers]:
        if getattr(layer, name) is not None:
            yield f"{name} would be lost"
    for name in FLAGS:
        value = getattr(layer, name, None)
        if not isinstance(value, nn.Module | Tensor) and value not in (None, False):
            yield f"{name} = {value} would be lost"
    if any(getattr(m, hooks) for m in layer.modules() for hooks in HOOKS) or any(
        p._backward_hooks for p in layer.parameters()
    ):
        yield "its hooks would be lost"
    if any("forward" in vars(m) or m._compiled_call_impl is not None for m in layer.modules()):
        yield "its forward was replaced or compiled"


def reasons_of_weights(weights: Weights, owners: Counter[int]) -> Iterator[str]:
    """Unless qkv is (3d, d) or three of (d, d), and proj (d, d), of one kind, used nowhere else."""
    linears = [*weights.qkv, weights.proj]
    for linear in linears:
        if type(linear) is not nn.Linear or type(linear.weight) not in (nn.Parameter, Tensor):
            kind = f"a {type(linear).__name__} of a {type(getattr(linear, 'weight', None)).__name__}"
            yield f"a projection is {kind}, not plain"
            return  # its weight may be no tensor
    dim = weights.proj.out_features
    shapes = [(3 * dim if len(weights.qkv) == 1 else dim, dim)] * len(weights.qkv) + [(dim, dim)]
    for linear, shape in zip(linears, shapes, strict=True):
        if tuple(linear.weight.shape) != shape:
            yield f"a projection has the shape {tuple(linear.weight.shape)}, not {shape}"
    parameters = [p for linear in linears for p in linear.parameters()]
    if dim % weights.num_heads:
        yield f"d = {dim} is not divisible by its {weights.num_heads} heads"
    if any(owners[id(p)] > 1 for p in parameters):
        yield "it shares weights with another layer"
    if len({(p.dtype, p.device) for p in parameters}) > 1 or parameters[0].dtype not in checks.DTYPES:
        yield "its weights are not of one floating dtype on one device"
    if len({(linear.weight.requires_grad, linear.bias is None or linear.bias.requires_grad, linear.bias is None)
            for linear in weights.qkv}) > 1:  # fmt: skip
        yield "its query, key and value projections differ in bias or requires_grad"


def reasons_around(model: nn.Module, name: str) -> Iterator[str]:
    """The tokens are frames or of no image, there are more of them, or the model masks them in a way of its own."""
    if any(map(FRAMES.search, name.split("."))) or any("num_frames" in a for _, a in arguments_around(model, name)):
        yield "its tokens are frames of a video, or may be: DyDiLA is for those of an image"
    for own in filter(NO_IMAGE.search, name.split(".")):
        yield f"its tokens are of no image, by the name {own}"
    for block, arguments in arguments_around(model, name):
        for argument in sorted(MORE_TOKENS & arguments):
            yield f"{type(block).__name__} adds tokens of another kind ({argument})"
    for outer in map(model.get_submodule, ancestors(name)):
        if causal := [b for b in outer._buffers if "causal" in b]:
            yield f"{type(outer).__name__} masks its tokens ({', '.join(causal)})"


def arguments_around(model: nn.Module, name: str) -> Iterator[tuple[nn.Module, set[str]]]:
    """The modules around a layer that know its tokens, from the inside to the one that makes them of a map."""
    for outer in map(model.get_submodule, ancestors(name)):
        yield outer, set(inspect.signature(outer.forward).parameters)
        if code.takes_maps(outer):
            return


def select(found: Sequence[Found], include: Selection | None, exclude: Selection) -> None:
    """Gives the layers that the caller does not want swapped a reason to stay."""
    fit = [a for a in found if not a.reasons]
    included = None if include is None else chosen_by("include", include, found, fit)
    excluded = chosen_by("exclude", exclude, found, fit)
    for a in fit:
        if included is not None and id(a) not in included:
            a.reasons.append("the caller did not include it")
        if id(a) in excluded:
            a.reasons.append("the caller excluded it")


def chosen_by(argument: str, selection: Selection, found: Sequence[Found], fit: Sequence[Found]) -> set[int]:
    """The layers, by id, that the names, globs and indices of the caller stand for; each must stand for one or more."""
    chosen: set[int] = set()
    items: list[Any] = [selection] if isinstance(selection, str | Integral) else list(selection)  # type: ignore[arg-type]
    for item in items:
        if isinstance(item, bool) or not isinstance(item, str | Integral):
            raise TypeError(f"{argument} must hold names, globs and indices; got {type(item).__name__} {item!r}")
        if isinstance(item, Integral):
            if not -len(fit) <= int(item) < len(fit):
                raise ValueError(f"{argument} has the index {item}, but {len(fit)} layers can be swapped")
            matched = [fit[int(item)]]
        else:
            matched = [a for a in found if any(matches(name, item) for name in a.names)]
            if not matched:
                names = ", ".join(name for a in found for name in a.names) or "none"
                raise ValueError(f"{argument} has {item!r}, which matches no attention layer; there are: {names}")
        chosen.update(map(id, matched))
    return chosen


def matches(name: str, glob: str) -> bool:
    """Whether a layer, or a module around it, has a name of that form."""
    return any(fnmatchcase(n, glob) for n in [name, *ancestors(name)] if n)


def ancestors(name: str) -> Iterable[str]:
    """ "a.b.c" -> "a.b", "a" and "", the model itself."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)
