"""What replace_attention did to a model, as a table and to be undone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from dydila_kernels.attention import DyDiLAttention
from dydila_kernels.convert.kinds import child, is_more
from dydila_kernels.convert.recipe import write
from dydila_kernels.convert.structure import put, require_plain


class Swapped(NamedTuple):
    """A layer that was swapped: its name in the model, what stood there and what does now."""

    name: str
    old: nn.Module
    new: DyDiLAttention


class Kept(NamedTuple):
    """An attention layer that was left as it is, and why: all reasons, separated by semicolons."""

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
    _HW: Any = field(repr=False)
    _hooks: list[Any] = field(default_factory=list, repr=False)
    _undone: bool = field(default=False, repr=False)

    @property
    def new_parameters(self) -> list[str]:
        """The names in the model of the parameters that were not there before, fixed routers included."""
        return [f"{layer.name}.{name}" for layer in self.swapped for name, _ in fresh_parameters(layer)]

    @property
    def linears(self) -> list[str]:
        """The names in the model of the ``qkv`` and ``proj`` of the new layers, as ``target_modules`` of peft takes."""
        return [f"{layer.name}.{part}" for layer in self.swapped for part in ("qkv", "proj")]

    def recipe(self) -> dict[str, Any]:
        """What :func:`repeat_replacement` needs to do the same to another such model, in types that JSON holds.

        ``{"version": 1, "layers": [names], "HW": None, sides or "function", "options": {...}}``.  A function that was
        given as ``HW`` is not in it: it has to be given again.
        """
        return write([layer.name for layer in self.swapped], self._HW, self.options)

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
        for hook in self._hooks:
            hook.remove()
        self._undone = True

    def __str__(self) -> str:
        fresh = {id(p): p.numel() for layer in self.swapped for _, p in fresh_parameters(layer)}
        return "\n".join(
            [
                f"swapped: {len(self.swapped)}, with {sum(fresh.values()):,} new parameters",
                *table((name, title(old), sizes(new)) for name, old, new in self.swapped),
                f"  options: {', '.join(f'{name}={value!r}' for name, value in self.options.items())}",
                f"  grid: {self.grid}",
                f"kept: {len(self.kept)}",
                *table((name, title(layer), reason) for name, layer, reason in self.kept),
            ]
        )


def fresh_parameters(layer: Swapped) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that the old layer does not have."""
    norms = any(is_more(child(layer.old, name)) for name in ("q_norm", "norm_q"))
    carried = ("qkv.", "proj.", "q_norm.", "k_norm.") if norms else ("qkv.", "proj.")
    return ((name, p) for name, p in layer.new.named_parameters() if not name.startswith(carried))


def title(layer: nn.Module) -> str:
    """The class of a layer, and in diffusers its processor."""
    processor = getattr(layer, "processor", None)
    return type(layer).__name__ + ("" if processor is None else f" ({type(processor).__name__})")


def sizes(layer: DyDiLAttention) -> str:
    text = f"d = {layer.dim}, H = {layer.num_heads}"
    return text if layer.qk_norm is None else f"{text}, {layer.qk_norm} norm of each {layer.qk_norm_across}"


def table(rows: Any) -> list[str]:
    """Lines of aligned columns."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(f"{text:{w}}" for text, w in zip(row, widths, strict=True)).rstrip() for row in rows]
