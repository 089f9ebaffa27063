"""replace_attention: the self-attention of an existing model gives way to DyDiLAttention with its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import nn

from dydila_kernels.convert.grid import Sides
from dydila_kernels.convert.layers import ReplacedAttention
from dydila_kernels.convert.norms import QKNorm, carry_norm
from dydila_kernels.convert.recipe import FROM_THE_OLD_LAYER, read
from dydila_kernels.convert.report import Kept, ReplacementReport, Swapped, table, title
from dydila_kernels.convert.sources import Sources
from dydila_kernels.convert.structure import Found, Selection, ancestors, find_attention, put, require_plain, select


def replace_attention(
    model: nn.Module,
    *,
    include: Selection | None = None,
    exclude: Selection = (),
    HW: Sides | Callable[..., Sides] | None = None,
    num_heads: int | None = None,
    num_prefix_tokens: int | None = None,
    proj_drop: float | None = None,
    normalization: str = "denominator",
    gamma_init: float = 1.0,
    lambda_init: float = 0.001,
    **options: Any,
) -> ReplacementReport:
    """Swaps the self-attention layers of a model, in place, for DyDiLAttention with their weights.

    Recognised by their structure are the attention of timm, DiT, PixArt, NVlabs' Sana and LightningDiT (``qkv``,
    ``proj``) and that of diffusers (``to_q``, ``to_k``, ``to_v``, ``to_out``), as in SanaTransformer2DModel,
    SanaVideoTransformer3DModel, WanTransformer3DModel and UNet2DConditionModel, with RMS or layer norms of queries and
    keys or without.  A layer that has anything which the new one would lose is kept, and so are cross-attention, joint
    attention to text and attention between frames; the report tells why.

    The new layers start near plain linear attention (Eq. 4 of the paper) with the old weights: the convolution at
    zero, gamma at 1, lambda small.  Only for Sana and SANA-Video, which have that attention, are they nearly what the
    old layers were.  Rotary embeddings turn queries and keys after the kernel, as in SANA-Video.

    Args:
        model: the model, neither wrapped (DDP, FSDP) nor compiled; of a pipeline, the network in it.
        include, exclude: which layers to swap, by default all, and which not: a name, a glob or an index, or several.
            A name may be that of the layer or of a module around it ("blocks.3"); an index counts the layers that can
            be swapped.
        HW: the grid of the image, (rows, columns), or of the video, (frames, rows, columns).  None: each layer has it
            from the nearest module around it that is called with a map (B, C, rows, columns), or in which one
            convolution with kernel = stride makes the patches, or from its block, where that passes it; sides: these in
            every call; or a function of the arguments of the model that returns them.
        num_heads: H, by default that of the old layer.
        num_prefix_tokens: class and register tokens before the grid, by default what the model says, or 0.
        proj_drop: dropout on the output, by default that of the old layer.
        normalization, gamma_init, lambda_init, options: further arguments of :class:`DyDiLAttention`.

    Returns:
        A report, which can also undo the swap.  It holds the old layers; drop it to free them.

    Raises:
        TypeError, ValueError: an argument is not as described, the model is wrapped, there is nothing to swap, or
            nothing shows the grid and ``HW`` is None.  The model is then as it was.
    """
    require_module(model)
    require_plain(model)
    for name in FROM_THE_OLD_LAYER:
        if name in options:
            raise TypeError(f"{name} must be left to the old layer, which decides it; got {options[name]!r}")
    options = {"normalization": normalization, "gamma_init": gamma_init, "lambda_init": lambda_init, **options}
    given = {"num_heads": num_heads, "num_prefix_tokens": num_prefix_tokens, "proj_drop": proj_drop}
    options |= {name: value for name, value in given.items() if value is not None}

    found = find_attention(model)
    select(found, include, exclude)
    return swap(model, found, HW, options)


def repeat_replacement(
    model: nn.Module, recipe: Mapping[str, Any], *, HW: Callable[..., Sides] | None = None
) -> ReplacementReport:
    """Swaps the layers that a recipe names, in place, with its options, so that trained weights can be loaded.

    Args:
        model: built as the one was of whose report the recipe is; as for :func:`replace_attention`.
        recipe: what :meth:`ReplacementReport.recipe` returned, also by way of JSON.  Nothing in it is executed.
        HW: the function that the swap was made with, where it was made with one.

    Returns:
        A report, as :func:`replace_attention` does.

    Raises:
        TypeError, ValueError: the recipe is malformed, the model lacks one of its layers or cannot have it swapped, or
            as for :func:`replace_attention`.  The model is then as it was.
    """
    require_module(model)
    require_plain(model)
    layers, sides, options = read(recipe, HW)
    found = find_attention(model)
    by_name = {name: a for a in found for name in a.names}
    for name in layers:
        if name not in by_name:
            raise ValueError(
                f"recipe['layers'] has {name!r}, which is no attention layer of the model; there are: "
                f"{', '.join(by_name) or 'none'}"
            )
        if by_name[name].reasons:
            raise ValueError(
                f"recipe['layers'] has {name!r}, which cannot be swapped in this model: "
                f"{'; '.join(by_name[name].reasons)}"
            )
    named = {id(by_name[name]) for name in layers}
    for a in found:
        if id(a) not in named and not a.reasons:
            a.reasons.append("the recipe does not name it")
    return swap(model, found, sides, options)


def swap(model: nn.Module, found: Sequence[Found], HW: Any, options: dict[str, Any]) -> ReplacementReport:
    """Swaps what has no reason to stay."""
    kept = [Kept(name, a.layer, "; ".join(a.reasons)) for a in found for name in a.names if a.reasons]
    chosen = [a for a in found if not a.reasons]
    if not chosen:
        reasons = table((name, title(layer), reason) for name, layer, reason in kept)
        raise ValueError("\n".join(["model has no self-attention that can be swapped", *reasons]))
    built = [build(model, a, options) for a in chosen]
    sources = None
    if built[0].dwc is not None:
        sources = Sources(model, HW, found, chosen)
    elif HW is not None:
        raise ValueError(f"HW must be None with dwc_branches=(), which leaves nothing that needs it; got {HW!r}")

    for i, (a, new) in enumerate(zip(chosen, built, strict=True)):
        new.place = a.names[0]
        new.grid = None if sources is None else sources.grids[i]
        for name in a.names:
            put(model, name, new)
    swapped = [Swapped(name, a.layer, new) for a, new in zip(chosen, built, strict=True) for name in a.names]
    grid = "none, for want of a convolution" if sources is None else str(sources)
    return ReplacementReport(swapped, kept, options, grid, model, HW, [] if sources is None else sources.install())


def require_module(model: object) -> None:
    if isinstance(model, nn.Module):
        return
    inside = [name for name, m in getattr(model, "__dict__", {}).items() if isinstance(m, nn.Module)]
    fit = [name for name in inside if any(not a.reasons for a in find_attention(getattr(model, name)))]
    hint = f": pass its {' or '.join(f'.{name}' for name in fit)}" if fit else ""
    raise TypeError(f"model must be an nn.Module; got {type(model).__name__}{hint}")


def build(model: nn.Module, found: Found, options: dict[str, Any]) -> ReplacedAttention:
    """The new layer, with the weights of the old one."""
    weights = found.weights
    assert weights is not None
    qkv, proj = weights.qkv, weights.proj
    if weights.qk_norm is not None:
        options = with_norm(options, found.names[0], weights.qk_norm, weights.num_heads)
    new = weights.replacement(
        proj.out_features,
        **{
            "num_heads": weights.num_heads,
            "num_prefix_tokens": prefix_tokens(model, found.names[0]),
            "proj_drop": weights.proj_drop,
            "qkv_bias": qkv[0].bias is not None,
            "proj_bias": proj.bias is not None,
            "device": proj.weight.device,
            "dtype": proj.weight.dtype,
            **options,
        },
    )
    with torch.no_grad():
        for mine, old in ((new.qkv, qkv), (new.proj, [proj])):
            mine.weight.copy_(torch.cat([linear.weight for linear in old]))
            mine.weight.requires_grad_(old[0].weight.requires_grad)
            if mine.bias is not None:
                mine.bias.copy_(torch.cat([linear.bias for linear in old]))
                mine.bias.requires_grad_(old[0].bias.requires_grad)
        for norm, old_norm in zip((new.q_norm, new.k_norm), weights.norms, strict=False):
            assert norm is not None
            carry_norm(norm, old_norm)
        if new.dwc is not None:
            for branch in new.dwc.branches.values():
                branch.zero_()
    return new.train(found.layer.training)  # type: ignore[return-value]


def with_norm(options: dict[str, Any], place: str, norm: QKNorm, num_heads: int) -> dict[str, Any]:
    """The options with those of the old layer's norms.  Raises TypeError or ValueError where the caller has others."""
    for name in options.keys() & set(QKNorm._fields):
        raise TypeError(f"{name} must be left to the old layer {place}, which has norms; got {options[name]!r}")
    if norm.qk_norm_across == "head" and options.get("num_heads", num_heads) != num_heads:
        raise ValueError(
            f"num_heads must be that of the old layer {place}, {num_heads}, whose norms are of its heads; "
            f"got {options['num_heads']!r}"
        )
    return options | norm._asdict()


def prefix_tokens(model: nn.Module, name: str) -> int:
    """``num_prefix_tokens`` of the nearest module around the layer that has it, 0 where none does."""
    for outer in ancestors(name):
        number = getattr(model.get_submodule(outer), "num_prefix_tokens", None)
        if isinstance(number, Integral) and not isinstance(number, bool):
            return int(number)
    return 0
