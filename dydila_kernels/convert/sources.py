"""Where the layers of a model have the sides of the grid from, which is decided before any is swapped."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from dydila_kernels import checks
from dydila_kernels.convert import code
from dydila_kernels.convert.grid import FirstArgument, ImageGrid
from dydila_kernels.convert.structure import Found, ancestors

HOLDERS = (nn.ModuleList, nn.ModuleDict)
"""Modules that are never called."""

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
POOLS = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool3d, nn.MaxPool3d)


class Place(NamedTuple):
    """A module whose call is about one image, and the convolution in it that makes the patches, None if it has maps."""

    name: str
    patches: str | None


class Sources:
    """The grids of the layers, one for each place, and the hooks that note them."""

    def __init__(self, model: nn.Module, HW: Any, found: Sequence[Found], chosen: Sequence[Found]) -> None:
        """Raises TypeError or ValueError where HW is not as described, or is needed."""
        self.model, self.chosen = model, chosen
        self.places: dict[Place, ImageGrid] = {}
        if HW is None:
            convolutions = find_convolutions(model, found)
            places = [place_of_all(model, a, convolutions) for a in chosen]
            told = ImageGrid("what the blocks pass as HW")
            unknown = [
                a.names[0] for a, place in zip(chosen, places, strict=True) if place is None and not is_told(model, a)
            ]
            if unknown:
                raise ValueError(
                    "HW=(rows, columns), or a function of the model's arguments that returns it, is needed, or "
                    "dwc_branches=(), which leaves the convolution out, or exclude: nothing in the model shows the "
                    f"grid of the image to {', '.join(unknown)}"
                )
            for place in places:
                if place is not None and place not in self.places:
                    self.places[place] = grid_of(model, place)
            self.grids = [told if place is None else self.places[place] for place in places]
        elif callable(HW):
            grid = ImageGrid(f"{getattr(HW, '__name__', repr(HW))} of the model's arguments", of_arguments=HW)
            self.places[Place("", None)] = grid
            self.grids = [grid] * len(chosen)
        else:
            self.grids = [fixed_grid(HW)] * len(chosen)

    def __str__(self) -> str:
        return "; ".join(dict.fromkeys(grid.source for grid in self.grids))

    def install(self) -> list[Any]:
        """Puts the hooks on the model and returns their handles."""
        handles = []
        for place, grid in self.places.items():
            handles += grid.around(self.model.get_submodule(place.name))
            if place.patches is not None:
                patches = self.model.get_submodule(place.patches)
                handles.append(patches.register_forward_hook(grid.after_patches))
        # Blocks may be called without the module around, as by forward_features of timm.
        blocks = {
            (block, grid)
            for a, grid in zip(self.chosen, self.grids, strict=True)
            for block in [self.model.get_submodule(name.rpartition(".")[0]) for name in a.names]
            if grid.fixed is None
        }
        return handles + [block.register_forward_hook(grid.mark) for block, grid in blocks]


def fixed_grid(HW: Any) -> ImageGrid:
    sides = checks.sides(HW, 1, ", or a function that returns it")
    return ImageGrid(f"always {' x '.join(map(str, sides))}", fixed=sides)


def grid_of(model: nn.Module, place: Place) -> ImageGrid:
    if place.patches is not None:
        return ImageGrid(f"that of the patches of {place.patches}")
    module = model.get_submodule(place.name)
    argument = code.first_argument(module)
    assert argument is not None
    return ImageGrid(f"that of the input of {place.name or 'the model'}", of_arguments=FirstArgument(argument))


def find_convolutions(model: nn.Module, found: Sequence[Found]) -> dict[str, nn.Module]:
    """All that may change the grid, outside of the blocks that hold attention."""
    parents = {name.rpartition(".")[0] for a in found for name in a.names}
    blocks = {parent for parent in parents if not any(is_in(other, parent) for other in parents)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (*CONVOLUTIONS, *POOLS)) and not any(is_in(name, block) for block in blocks)
    }


def place_of_all(model: nn.Module, a: Found, convolutions: dict[str, nn.Module]) -> Place | None:
    """The place that all names of a layer have in common."""
    places = {place_of(model, name, a, convolutions) for name in a.names}
    return places.pop() if len(places) == 1 else None


def place_of(model: nn.Module, name: str, a: Found, convolutions: dict[str, nn.Module]) -> Place | None:
    """The nearest module around a layer that cuts an image into patches of d channels, or is called with a map."""
    assert a.weights is not None
    for outer in ancestors(name):
        inside = {n: m for n, m in convolutions.items() if is_in(n, outer)}
        patches = {
            n: m.kernel_size
            for n, m in inside.items()
            if isinstance(m, CONVOLUTIONS)
            and m.out_channels == a.weights.proj.out_features
            and m.kernel_size == m.stride
        }
        cutting = [n for n, kernel in patches.items() if set(kernel) != {1}]
        if not cutting and code.takes_maps(model.get_submodule(outer)):
            same = all(isinstance(m, CONVOLUTIONS) and set(m.stride) == {1} for m in inside.values())
            return Place(outer, None) if same else None
        if patches:
            around = next(o for o in (outer, *ancestors(outer)) if not isinstance(model.get_submodule(o), HOLDERS))
            (one, *more) = cutting or patches
            return None if more else Place(around, one)
    return None


def is_told(model: nn.Module, a: Found) -> bool:
    """Whether all blocks around a layer are told the grid, and it takes it, as in NVlabs' Sana and PixArt."""
    blocks = [model.get_submodule(name.rpartition(".")[0]) for name in a.names]
    return all("HW" in inspect.signature(module.forward).parameters for module in (a.layer, *blocks))


def is_in(name: str, outer: str) -> bool:
    return (outer == "" and name != "") or name.startswith(f"{outer}.")
