"""The rows and columns of the image, or frames of the video, that a call of a model is about, for its layers.

No block tells its attention the grid.  Hooks note it where it can be seen: at a convolution that makes patches, at a
module that is called with a map (B, C, rows, columns), or in the arguments of the model.  What they note belongs to the
call: it is kept for each thread, put aside while the model is called within itself, and forgotten when the call ends.

Activation checkpointing calls blocks again in the backward pass, which may run in another thread, when the call is long
over.  The output of a call therefore leaves its grid in the graph of autograd: as the backward pass comes by, and that
is before it recomputes anything, it learns which grids it is about.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dydila_kernels import checks

Sides = tuple[int, ...]
"""(rows, columns) of an image, or (frames, rows, columns) of a video."""
NO_BACKWARD = -1


class Here:
    """What one thread knows.  A grid is the shape of an empty tensor, for torch.compile takes ints to be constants."""

    def __init__(self) -> None:
        self.grid: Tensor | Sides | None = None  # of the call under way
        self.task = NO_BACKWARD  # the backward pass in which that call began
        self.outer: list[tuple[Tensor | Sides | None, int]] = []  # the calls around it
        self.recomputed: Tensor | Sides | None = None  # of the backward pass under way, for compiled blocks
        self.passes: set[int] = set()  # the backward passes that came by in this thread


class OfEachThread(threading.local):
    """Its attributes are only read in compiled code, which loses what is written to them."""

    def __init__(self) -> None:
        self.here = Here()


class ImageGrid:
    """The sides of the grid for all layers that have them from one place.

    Args:
        source: what this place is, in words.
        fixed: the same grid for all calls.
        of_arguments: returns the sides, or None, for the arguments of the module that :meth:`around` is told.
    """

    def __init__(
        self,
        source: str,
        fixed: Sides | None = None,
        of_arguments: Callable[..., Sides | None] | None = None,
    ) -> None:
        self.source, self.fixed, self.of_arguments = source, fixed, of_arguments
        self.threads = OfEachThread()
        self.backward: dict[int, set[Sides]] = {}  # the grids that a backward pass has come by, of all threads

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is about calls of its own."""
        return ImageGrid, (self.source, self.fixed, self.of_arguments)

    @property
    def here(self) -> Here:
        return self.threads.here

    def around(self, module: nn.Module) -> list[Any]:
        """Hooks on the module whose call is about one image; their handles."""
        return [
            module.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True),
            module.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.here.outer.append((self.here.grid, self.here.task))
        self.here.grid, self.here.task = None, backward_pass()
        if self.here.task == NO_BACKWARD and not torch.compiler.is_compiling():
            self.forget_failed()
        grid = None if self.of_arguments is None else self.of_arguments(*args, **kwargs)
        if grid is not None:
            self.note(*checks.sides(grid, 1, f", {self.source}"))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.mark(module, args, output)
        if self.here.outer:  # empty where another hook failed before enter
            self.here.grid, self.here.task = self.here.outer.pop()

    def after_patches(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of the convolution whose output (B, d, rows, columns) is the tokens; a video has frames, too."""
        self.note(*output.shape[2:])

    def note(self, *sides: int) -> None:
        for i, side in enumerate(sides):
            checks.integer(f"HW[{i}]", side, 1)
        if torch.compiler.is_compiling():
            self.here.grid = sides
        elif self.here.task == backward_pass():
            self.here.grid = torch.empty(sides, device="meta")
        else:  # a part of the model is recomputed, in which the patches are made
            self.come_by(sides)

    def mark(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook: leaves the grid of the call in the graph of the output."""
        if torch.compiler.is_compiling() or self.here.grid is None or self.here.task != backward_pass():
            return
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                leaf.grad_fn.register_prehook(partial(self.come_by, sides_of(self.here.grid)))

    def come_by(self, sides: Sides, *gradients: Any) -> None:
        """The backward pass under way is about this grid, too."""
        task = backward_pass()
        if task not in self.backward:
            self.backward[task] = set()
            self.here.passes.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(partial(self.forget, task))
        self.backward[task].add(sides)
        self.here.recomputed = torch.empty(sides, device="meta")

    def forget(self, task: int) -> None:
        self.backward.pop(task, None)
        self.here.passes.discard(task)
        self.here.recomputed = None

    def forget_failed(self) -> None:
        """Backward passes of this thread that raised told nobody; none is under way."""
        for task in tuple(self.here.passes):
            self.forget(task)

    def of(self, tokens: int | None) -> Sides:
        """The grid of a layer that is called with so many tokens beside those before the grid; None: with some of them.

        Raises:
            RuntimeError: there is none, for no call of the model is under way, or a backward pass recomputes the layer
                and has come by several that fit.
        """
        if self.fixed is not None:
            return self.fixed
        here = self.here
        if torch.compiler.is_compiling():  # which cannot ask whether a backward pass is under way
            grid = here.recomputed if here.grid is None else here.grid
        elif here.task == backward_pass():
            grid = here.grid
        else:
            return self.of_recomputation(tokens)
        if grid is None:
            raise RuntimeError(
                f"the grid is {self.source}, and no call is under way in which this has shown it: call the model "
                "itself, or pass HW=(rows, columns) to this layer, or HW to replace_attention"
            )
        return sides_of(grid)

    def of_recomputation(self, tokens: int | None) -> Sides:
        grids = sorted(self.backward.get(backward_pass(), ()))
        fitting = [grid for grid in grids if tokens is None or fits(grid, tokens)]
        if len(fitting) == 1:
            return fitting[0]
        raise RuntimeError(
            f"the backward pass recomputes a layer of {tokens or 'some'} tokens (activation checkpointing) and must "
            f"know its one grid; it is about calls with the grids {fitting or grids}: call backward after each"
        )


def sides_of(grid: Tensor | Sides) -> Sides:
    return tuple(grid.shape) if isinstance(grid, Tensor) else grid


def fits(grid: Sides, tokens: int) -> bool:
    """Whether so many tokens are those of the whole grid, or of each frame of a video."""
    return math.prod(grid) == tokens or (len(grid) == 3 and grid[1] * grid[2] == tokens)


def backward_pass() -> int:
    """The number of the backward pass that runs in this thread, as torch.utils.checkpoint asks."""
    return NO_BACKWARD if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


class FirstArgument:
    """(rows, columns) of the map (B, C, rows, columns) that a module is called with, None if it is no map."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Sides | None:
        value = args[0] if args else kwargs.get(self.name)
        if not isinstance(value, Tensor) or value.dim() != 4:
            return None
        rows, columns = value.shape[-2:]
        return rows, columns
