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
from typing import Any

from torch import nn

from dydila_kernels.attention import DyDiLAttention
from dydila_kernels.convert import code
from dydila_kernels.convert.kinds import Weights, read

WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "OptimizedModule",
            "ScriptModule", "GraphModule"}  # fmt: skip
"""Classes of models that hold on to their layers, by name, so that none has to be imported."""

QUERIES = re.compile(r"(to_|w_?|linear_)?(q|qk|qkv|query|query_key_value)(_proj|_linear)?")
"""Names that projections to queries go by."""

ATTENTION = re.compile(r"(\w+_)?(attn|attention|mhsa|msa|mha)\d*")
"""Names that attention layers go by in the module around them."""

FRAMES = re.compile("temporal|motion|frame|(^|_)temp(_|$)", re.IGNORECASE)
NO_IMAGE = re.compile("text|caption|prompt|context|audio", re.IGNORECASE)
"""What is in the name of a layer, or of one around it, whose tokens are not those of an image."""

MORE_TOKENS = {"objs", "kv"}
"""Arguments of blocks that hand their attention further tokens (GLIGEN, Stable Cascade)."""

Selection = str | int | Sequence[str | int]


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
        around = [model.get_submodule(outer) for name in a.names for outer in ancestors(name)]
        a.weights, a.reasons = read(a.layer, owners, around)
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


def reasons_around(model: nn.Module, name: str) -> Iterator[str]:
    """The tokens are frames or of no image, there are more of them, or the model masks them in a way of its own."""
    if any(map(FRAMES.search, name.split("."))) or any("num_frames" in a for _, a in arguments_around(model, name)):
        yield "its tokens are frames of a video, or may be, and not those of an image or of all frames"
    for own in filter(NO_IMAGE.search, name.split(".")):
        yield f"its tokens are of no image, by the name {own}"
    for block, arguments in arguments_around(model, name):
        for argument in sorted(MORE_TOKENS & arguments):
            yield f"{type(block).__name__} adds tokens of another kind ({argument})"
    for outer in map(model.get_submodule, ancestors(name)):
        if causal := [b for b in outer._buffers if "causal" in b]:
            yield f"{type(outer).__name__} masks its tokens ({', '.join(causal)})"
    block = model.get_submodule(name.rpartition(".")[0])
    if isinstance(size := getattr(block, "window_size", None), int | Sequence) and size:
        yield f"{type(block).__name__} may cut windows (window_size = {size})"


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
