"""replace_attention: the self-attention of an existing model gives way to DyDiLAttention with its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from dydila_kernels import checks
from dydila_kernels.attention import DyDiLAttention
from dydila_kernels.convert.layers import ImageGrid, ReplacedAttention, RowsColumns
from dydila_kernels.convert.structure import (
    Found,
    Selection,
    find_attention,
    find_patches,
    prefix_tokens,
    put,
    require_plain,
    select,
)

FROM_THE_OLD_LAYER = ("dim", "qkv_bias", "proj_bias", "device", "dtype")
"""Arguments of DyDiLAttention that the old layer decides."""


class Swapped(NamedTuple):
    """A layer that was swapped: its name in the model, what stood there and what does now."""

    name: str
    old: nn.Module
    new: DyDiLAttention


class Kept(NamedTuple):
    """An attention layer that was left as it is, and why."""

    name: str
    layer: nn.Module
    reason: str


@dataclass
class ReplacementReport:
    """What :func:`replace_attention` did; ``print`` shows it as a table.

    Attributes:
        swapped, kept: the layers, in the order of the model.  A layer that the model has under several names comes
            under each.
        options: the arguments of the new layers, besides those that the old layers decide.
        grid: where the new layers have the rows and columns of the image from.
    """

    swapped: list[Swapped]
    kept: list[Kept]
    options: dict[str, Any]
    grid: str
    _model: nn.Module = field(repr=False)
    _hook: Any = field(default=None, repr=False)
    _undone: bool = field(default=False, repr=False)

    @property
    def new_parameters(self) -> list[str]:
        """The names in the model of the parameters that were not there before, fixed routers included."""
        return [f"{layer.name}.{name}" for layer in self.swapped for name, _ in fresh_parameters(layer.new)]

    def undo(self) -> None:
        """Puts the old layers back, as they were: the model computes what it did before, to the bit.

        They follow the model to its device, dtype and mode.  What the new layers have learned is not carried back;
        ``model.state_dict()``, taken before, keeps it.  Asking twice changes nothing.

        Raises:
            RuntimeError: something else stands where a new layer was put, or the old weights were on the meta device
                and the new ones are not.  Nothing is changed then.
            ValueError: the model has been sharded or compiled since.
        """
        if self._undone:
            return
        require_plain(self._model)
        modules = dict(self._model.named_modules(remove_duplicate=False))
        for name, old, new in self.swapped:
            if modules.get(name) is not new:
                raise RuntimeError(
                    f"{name} is no longer the layer that replace_attention put there: undo would lose it"
                )
            if not new.measure.gamma.is_meta and any(p.is_meta for p in old.parameters()):
                raise RuntimeError(f"{name} was on the meta device when swapped, so there are no weights to go back to")
        for name, old, new in self.swapped:
            gamma = new.measure.gamma
            put(self._model, name, old.to(device=gamma.device, dtype=gamma.dtype).train(new.training))
        if self._hook is not None:
            self._hook.remove()
        self._undone = True

    def __str__(self) -> str:
        fresh = {id(p): p.numel() for layer in self.swapped for _, p in fresh_parameters(layer.new)}
        return "\n".join(
            [
                f"swapped: {len(self.swapped)}, with {sum(fresh.values()):,} new parameters",
                *table((name, title(old), f"d = {new.dim}, H = {new.num_heads}") for name, old, new in self.swapped),
                f"  options: {', '.join(f'{name}={value!r}' for name, value in self.options.items())}",
                f"  grid: {self.grid}",
                f"kept: {len(self.kept)}",
                *table((name, title(layer), reason) for name, layer, reason in self.kept),
            ]
        )


def replace_attention(
    model: nn.Module,
    *,
    include: Selection | None = None,
    exclude: Selection = (),
    HW: RowsColumns | Callable[..., RowsColumns] | None = None,
    num_heads: int | None = None,
    num_prefix_tokens: int | None = None,
    proj_drop: float | None = None,
    normalization: str = "denominator",
    gamma_init: float = 1.0,
    lambda_init: float = 0.001,
    **options: Any,
) -> ReplacementReport:
    """Swaps the self-attention layers of a model, in place, for DyDiLAttention with their weights.

    Recognised are the attention of timm and DiT (``qkv``, ``proj``) and that of diffusers (``to_q``, ``to_k``,
    ``to_v``, ``to_out``), as in DiTTransformer2DModel, SanaTransformer2DModel and PixArtTransformer2DModel.  A layer
    that has anything which the new one would lose is kept, and so is cross-attention; the report tells why.

    The new layers start near plain linear attention (Eq. 4 of the paper) with the old weights: the convolution at
    zero, gamma at 1, lambda small.  Only for Sana, which has that attention, are they nearly what the old layers were.

    Args:
        model: the model, neither wrapped (DDP, FSDP) nor compiled.
        include, exclude: which layers to swap, by default all, and which not: a name, a glob or an index, or several.
            A name may be that of the layer or of a module around it ("blocks.3"); an index counts the layers that can
            be swapped.
        HW: the grid of the image.  None: as noted where a Conv2d with kernel = stride makes the patches, or where the
            model has no such, or several, a square; (rows, columns): this one in every call; or a function of the
            arguments of the model that returns it.
        num_heads: H, by default that of the old layer.
        num_prefix_tokens: class and register tokens before the grid, by default what the model says, or 0.
        proj_drop: dropout on the output, by default that of the old layer.
        normalization, gamma_init, lambda_init, options: further arguments of :class:`DyDiLAttention`.

    Returns:
        A report, which can also undo the swap.  It holds the old layers; drop it to free them.

    Raises:
        TypeError, ValueError: an argument is not as described, the model is wrapped, or there is nothing to swap.  The
            model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    require_plain(model)
    for name in FROM_THE_OLD_LAYER:
        if name in options:
            raise TypeError(f"{name} must be left to the old layer, which decides it; got {options[name]!r}")
    options = {"normalization": normalization, "gamma_init": gamma_init, "lambda_init": lambda_init, **options}
    given = {"num_heads": num_heads, "num_prefix_tokens": num_prefix_tokens, "proj_drop": proj_drop}
    options |= {name: value for name, value in given.items() if value is not None}

    found = find_attention(model)
    select(found, include, exclude)
    kept = [Kept(name, a.layer, a.reason) for a in found for name in a.names if a.reason is not None]
    chosen = [a for a in found if a.reason is None]
    if not chosen:
        reasons = table((name, title(layer), reason) for name, layer, reason in kept)
        raise ValueError("\n".join(["model has no self-attention that can be swapped", *reasons]))
    built = [build(model, a, options) for a in chosen]
    grid, source, install = choose_grid(model, HW, found, built)

    for a, new in zip(chosen, built, strict=True):
        new.grid = grid
        for name in a.names:
            put(model, name, new)
    swapped = [Swapped(name, a.layer, new) for a, new in zip(chosen, built, strict=True) for name in a.names]
    return ReplacementReport(swapped, kept, options, source, model, None if install is None else install())


def build(model: nn.Module, found: Found, options: dict[str, Any]) -> ReplacedAttention:
    """The new layer, with the weights of the old one."""
    weights = found.weights
    assert weights is not None
    qkv, proj = weights.qkv, weights.proj
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
        if new.dwc is not None:
            for branch in new.dwc.branches.values():
                branch.zero_()
    return new.train(found.layer.training)  # type: ignore[return-value]


def choose_grid(
    model: nn.Module, HW: Any, found: Sequence[Found], built: Sequence[ReplacedAttention]
) -> tuple[ImageGrid, str, Callable[[], Any] | None]:
    """The grid that the new layers share, where it comes from, and what installs the hook that notes it."""
    if built[0].dwc is None:
        if HW is not None:
            raise ValueError(f"HW must be None with dwc_branches=(), which leaves nothing that needs it; got {HW!r}")
        return ImageGrid(), "none, for want of a convolution", None
    if callable(HW):
        grid = ImageGrid(of_call=HW)
        name = getattr(HW, "__name__", repr(HW))
        return (
            grid,
            f"{name} of the model's arguments",
            lambda: model.register_forward_pre_hook(grid.before_model, with_kwargs=True),
        )
    if HW is not None:
        if isinstance(HW, str) or not isinstance(HW, Sequence) or len(HW) != 2:
            raise TypeError(f"HW must be None, (rows, columns) or a function that returns it; got {HW!r}")
        rows, columns = HW
        checks.integer("HW[0]", rows, 1)
        checks.integer("HW[1]", columns, 1)
        return ImageGrid((rows, columns)), f"always {rows} x {columns}", None
    patches = find_patches(model, found, {new.dim for new in built})
    if patches is None:
        return ImageGrid(), "a square: no one Conv2d makes the patches, so others need HW", None
    name, convolution = patches
    grid = ImageGrid()
    return grid, f"that of the patches of {name}", lambda: convolution.register_forward_hook(grid.after_patches)


def fresh_parameters(layer: DyDiLAttention) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that no old layer has."""
    return ((name, p) for name, p in layer.named_parameters() if not name.startswith(("qkv.", "proj.")))


def title(layer: nn.Module) -> str:
    """The class of a layer, and in diffusers its processor."""
    processor = getattr(layer, "processor", None)
    return type(layer).__name__ + ("" if processor is None else f" ({type(processor).__name__})")


def table(rows: Any) -> list[str]:
    """Lines of aligned columns."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(f"{text:{w}}" for text, w in zip(row, widths, strict=True)).rstrip() for row in rows]
