"""How a swap is repeated on another model of the same architecture: a mapping that JSON holds, checked when read.

    {"version": 1, "layers": ["blocks.0.attn"], "HW": null, "options": {"lambda_init": 0.001}}

``HW`` is null, the sides, or "function".  Nothing in it is executed, imported or opened.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

from dydila_kernels import checks
from dydila_kernels.attention import DyDiLAttention
from dydila_kernels.convert.grid import Sides

VERSION = 1
FIELDS = ("version", "layers", "HW", "options")
A_FUNCTION = "function"

FROM_THE_OLD_LAYER = ("dim", "qkv_bias", "proj_bias", "device", "dtype")
"""Arguments of DyDiLAttention that the old layer decides."""

OPTIONS = [name for name in inspect.signature(DyDiLAttention).parameters if name not in FROM_THE_OLD_LAYER]


class Recipe(NamedTuple):
    """What :func:`read` makes of the mapping."""

    layers: list[str]
    HW: Sides | Callable[..., Sides] | None
    options: dict[str, Any]


def write(layers: Sequence[str], HW: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    sides = A_FUNCTION if callable(HW) else None if HW is None else list(checks.sides(HW, 1))
    return {
        "version": VERSION,
        "layers": list(layers),
        "HW": sides,
        "options": {name: plain(value) for name, value in options.items()},
    }


def plain(value: Any) -> Any:
    """The value in types of JSON: numbers of any library, tuples."""
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    return [plain(item) for item in value]


def read(recipe: object, HW: Any) -> Recipe:
    """Raises TypeError or ValueError, with the field, its value and what was expected."""
    if not isinstance(recipe, Mapping):
        raise TypeError(f"recipe must be a mapping, as report.recipe() returns it; got {type(recipe).__name__}")
    if missing := [field for field in FIELDS if field not in recipe]:
        raise ValueError(f"recipe must have the fields {', '.join(FIELDS)}; it lacks {', '.join(missing)}")
    if unknown := [field for field in recipe if field not in FIELDS]:
        raise ValueError(f"recipe must have the fields {', '.join(FIELDS)} alone; it has {unknown[0]!r} beside them")
    version, layers, sides, options = (recipe[field] for field in FIELDS)
    if type(version) is not int or version != VERSION:
        raise ValueError(f"recipe['version'] must be {VERSION}, the one that this release reads; got {version!r}")
    if not isinstance(layers, list) or not layers or not all(isinstance(name, str) for name in layers):
        raise TypeError(f"recipe['layers'] must be a list of the names of one layer or more; got {layers!r}")
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise TypeError(f"recipe['options'] must be a mapping from names to values; got {options!r}")
    for name in options:
        if name not in OPTIONS:
            raise ValueError(f"recipe['options'] has {name!r}, which is none of the options {', '.join(OPTIONS)}")
    if sides == A_FUNCTION:
        if not callable(HW):
            raise ValueError(
                "HW must be the function of the model's arguments that the swap was made with, "
                f"for recipe['HW'] is {A_FUNCTION!r}; got {HW!r}"
            )
        return Recipe(layers, HW, dict(options))
    if HW is not None:
        raise ValueError(f"HW must be None, for recipe['HW'] is {sides!r}; got {HW!r}")
    if sides is not None:
        try:
            sides = checks.sides(sides, 1)
        except (TypeError, ValueError) as error:
            raise type(error)(f"recipe['HW'] is {sides!r}: {error}, or null, or {A_FUNCTION!r}") from None
    return Recipe(layers, sides, dict(options))
