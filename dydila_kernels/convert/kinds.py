"""The kinds of attention that DyDiLAttention can stand for: how each is built, what is read and what would be lost."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from dydila_kernels import checks
from dydila_kernels.attention import DyDiLAttention
from dydila_kernels.convert import code
from dydila_kernels.convert.layers import (
    ROPE_TABLES,
    DiffusersAttention,
    LightningAttention,
    ReplacedAttention,
    SanaAttention,
    VisionAttention,
)
from dydila_kernels.convert.norms import QKNorm, qk_norm


class Kind(NamedTuple):
    """How a kind of attention is built, by the names of its parts, and the layer that stands for it.

    ``projections``: one or three to Q, K and V, and the last to the output; ``arguments``: what forward may take beside
    the tokens; ``relu``: a child that measures queries and keys as DyDiLAttention does with gamma = 1.
    """

    replacement: type[ReplacedAttention]
    projections: tuple[str, ...]
    norms: tuple[str, str]
    heads: str
    drop: str
    arguments: set[str]
    relu: str = ""


VISION = Kind(VisionAttention, ("qkv", "proj"), ("q_norm", "k_norm"), "num_heads", "proj_drop",
              {"attn_mask", "attn_bias", "is_causal"})  # fmt: skip
LIGHTNING = VISION._replace(replacement=LightningAttention, arguments={"rope"})
SANA = VISION._replace(
    replacement=SanaAttention,
    arguments={"mask", "HW", "block_id", "image_rotary_emb", "rotary_emb"},
    relu="kernel_func",
)
DIFFUSERS = Kind(DiffusersAttention, ("to_q", "to_k", "to_v", "to_out.0"), ("norm_q", "norm_k"), "heads", "to_out.1",
                 {"encoder_hidden_states", "attention_mask", "rotary_emb"})  # fmt: skip

PROCESSORS = {"AttnProcessor", "AttnProcessor2_0", "AttnProcessorNPU", "SanaAttnProcessor2_0",
              "SanaLinearAttnProcessor2_0", "SanaLinearAttnProcessor3_0", "SlicedAttnProcessor", "WanAttnProcessor",
              "XFormersAttnProcessor"}  # fmt: skip
"""Processors of diffusers that are attention and no more, beside norms and rotary embeddings."""

FLAGS = dict.fromkeys(("is_causal", "causal", "window_size", "rope", "use_rope", "rel_pos", "use_rel_pos",
                       "residual_connection"), False) | {"rescale_output_factor": 1, "sr_ratio": 1}  # fmt: skip
"""Attributes that, where set to anything else, make an attention more than its projections show."""

OTHER_KINDS = re.compile("channel|window|axial|causal|rope", re.IGNORECASE)
"""What a class has in its name whose attention is not among all tokens, or more, though its projections are plain."""

JOINT = re.compile("(^|_)add(ed)?_")
"""What is in the names that diffusers gives to projections and norms of text beside those of an image."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Weights(NamedTuple):
    """What the new layer takes from the old one."""

    replacement: type[ReplacedAttention]
    qkv: Sequence[nn.Linear]  # one (3d, d), or those of Q, K and V
    proj: nn.Linear
    norms: Sequence[nn.Module]  # of queries and of keys, or none
    qk_norm: QKNorm | None
    num_heads: int
    proj_drop: float


def read(layer: nn.Module, owners: Counter[int], around: Sequence[nn.Module]) -> tuple[Weights | None, list[str]]:
    """The weights of a layer that DyDiLAttention can stand for, or all reasons why it cannot.

    ``owners``: how many modules have a parameter, by its id; ``around``: the modules around the layer.
    """
    if isinstance(layer, DyDiLAttention):
        return None, ["it is a DyDiLAttention already"]
    kind = kind_of(layer)
    if kind is None and "cross" in type(layer).__name__.lower():
        return None, ["by the name of its class it is cross-attention"]
    if kind is None:
        return None, ["it has neither qkv and proj nor to_q, to_k, to_v and to_out"]
    reasons = [*(reasons_of_diffusers(layer) if kind is DIFFUSERS else reasons_of_vision(layer, kind))]
    reasons += reasons_of_more(layer, kind)
    projections = {name: child(layer, name) for name in kind.projections}
    linears = [linear for linear in projections.values() if isinstance(linear, nn.Linear)]
    reasons += [f"{name} is not an nn.Linear" for name, p in projections.items() if not isinstance(p, nn.Linear)]
    norms = {name: m for name in kind.norms if is_more(m := child(layer, name))}
    num_heads = getattr(layer, kind.heads, None)
    if isinstance(num_heads, bool) or not isinstance(num_heads, Integral) or num_heads < 1:
        return None, [*reasons, f"it has no {kind.heads}"]
    if len(linears) < len(projections):
        return None, reasons
    *qkv, proj = linears
    option = qk_norm([*norms.values()], proj.out_features, int(num_heads)) if len(norms) == 2 else None
    if option is None:
        reasons += [f"{name} ({type(norm).__name__}) would be lost" for name, norm in norms.items()]
    drop = dropout(layer, kind.drop)
    weights = Weights(kind.replacement, qkv, proj, [*norms.values()], option, int(num_heads), drop)
    reasons += reasons_of_weights(weights, owners)
    if kind is LIGHTNING:
        reasons += reasons_of_rope(around, proj.out_features // weights.num_heads)
    return (None, reasons) if reasons else (weights, [])


def kind_of(layer: nn.Module) -> Kind | None:
    if isinstance(getattr(layer, "to_q", None), nn.Module):
        return DIFFUSERS
    if not isinstance(getattr(layer, "qkv", None), nn.Module):
        return None
    _, further = arguments_of(layer)
    return next((kind for kind in (LIGHTNING, SANA) if further and kind.arguments.issuperset(further)), VISION)


def arguments_of(layer: nn.Module) -> tuple[str, list[str]]:
    """The first argument of the forward, and all others that have names."""
    parameters = [p for p in inspect.signature(layer.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
    names = [f"*{p.name}" if p.kind is p.VAR_POSITIONAL else p.name for p in parameters]
    return ("", names) if not names or names[0].startswith("*") else (names[0], names[1:])


def child(layer: nn.Module, name: str) -> nn.Module | None:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None


def is_more(module: nn.Module | None) -> TypeGuard[nn.Module]:
    return module is not None and not isinstance(module, nn.Identity)


def dropout(layer: nn.Module, name: str) -> float:
    module = child(layer, name)
    rate = getattr(layer, name, 0.0) if module is None else getattr(module, "p", 0.0)
    return float(rate or 0.0)


def reasons_of_vision(layer: nn.Module, kind: Kind) -> Iterator[str]:
    # PixArt calls its plain attention WindowAttention, and tells by use_rel_pos that it has no windows.
    match = OTHER_KINDS.search(type(layer).__name__)
    if match and not (match[0] == "Window" and getattr(layer, "use_rel_pos", None) is False):
        yield f"by the name of its class its attention is of another kind ({match[0].lower()})"
    for name in ("attn_drop", kind.drop):
        module = child(layer, name)
        if is_more(module) and not isinstance(module, nn.Dropout):
            yield f"{name} ({type(module).__name__}) would be lost"
    if rate := dropout(layer, "attn_drop"):
        yield f"attn_drop = {rate} would be lost: DyDiLA has no scores to drop"


def reasons_of_diffusers(layer: nn.Module) -> Iterator[str]:
    if getattr(layer, "is_cross_attention", False):
        yield "it is cross-attention"
    processor = type(getattr(layer, "processor", None))
    if processor.__name__ not in PROCESSORS:
        yield f"its processor {processor.__name__} may do more than attention"
    elif is_more(child(layer, "norm_q")) and not code.names(processor.__call__, "norm_q"):
        yield f"its processor {processor.__name__} passes over its norm_q"
    out = getattr(layer, "to_out", None)
    if not isinstance(out, nn.Module) or len(list(out.children())) != 2 or not isinstance(child(out, "1"), nn.Dropout):
        yield "to_out is not a projection and a dropout"


def reasons_of_more(layer: nn.Module, kind: Kind) -> Iterator[str]:
    """Whatever is beside the projections and would be lost."""
    known = {*kind.norms, "attn_drop", *(name.partition(".")[0] for name in (kind.drop, *kind.projections))}
    more = {name: m for name, m in layer.named_children() if name not in known and is_more(m)}
    if joint := [name for name in more if JOINT.search(name)]:
        yield f"it attends to text, or to other tokens, jointly ({', '.join(joint)})"
    for name, module in more.items():
        if name not in joint and not (name == kind.relu and type(module) is nn.ReLU):
            yield f"{name} ({type(module).__name__}) would be lost"
    first, further = arguments_of(layer)
    if unknown := [name for name in further if name not in kind.arguments]:
        yield f"its forward takes {', '.join(unknown)}"
    if code.dims_of_argument(type(layer).forward, first) - {3}:
        yield f"it takes tokens of other than 3 dimensions: its forward unpacks the shape of {first} otherwise"
    for name in [*layer._parameters, *layer._buffers]:
        if getattr(layer, name) is not None:
            yield f"{name} would be lost"
    for name, unset in FLAGS.items():
        value = getattr(layer, name, None)
        if not isinstance(value, nn.Module | Tensor) and value not in (None, False, unset):
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
    parameters = [p for part in (*linears, *weights.norms) for p in part.parameters()]
    if dim % weights.num_heads:
        yield f"d = {dim} is not divisible by its {weights.num_heads} heads"
    if any(owners[id(p)] > 1 for p in parameters):
        yield "it shares weights with another layer"
    if len({(p.dtype, p.device) for p in parameters}) > 1 or parameters[0].dtype not in checks.DTYPES:
        yield "its weights are not of one floating dtype on one device"
    if len({(linear.weight.requires_grad, linear.bias is None or linear.bias.requires_grad, linear.bias is None)
            for linear in weights.qkv}) > 1:  # fmt: skip
        yield "its query, key and value projections differ in bias or requires_grad"


def reasons_of_rope(around: Sequence[nn.Module], channels: int) -> Iterator[str]:
    """Unless modules around have rotary embeddings as LightningDiT's: tables (N, d/H) in which neighbours are pairs."""
    parts = [m for outer in around for m in outer.children() if all(hasattr(m, name) for name in ROPE_TABLES)]
    tables = [getattr(m, name) for m in parts for name in ROPE_TABLES]
    if not tables or not all(isinstance(t, Tensor) and turns_neighbours(t, channels) for t in tables):
        yield (
            f"its forward takes rope, and no module around it shows tables {' and '.join(ROPE_TABLES)} (N, {channels}) "
            "in which neighbours are pairs"
        )


def turns_neighbours(table: Tensor, channels: int) -> bool:
    if table.is_meta or table.dim() != 2 or table.shape[1] != channels or channels % 2:
        return False
    return torch.equal(table[:, 0::2], table[:, 1::2])
