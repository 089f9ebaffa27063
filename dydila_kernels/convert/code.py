"""What the code of a forward shows and no attribute does: the dimensions of its argument, and that it attends."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

ATTEND = {"scaled_dot_product_attention", "memory_efficient_attention", "flash_attn_func", "flash_attn_qkvpacked_func",
          "flash_attn_varlen_func", "flex_attention", "dispatch_attention_fn"}  # fmt: skip
"""Functions that are attention, by name."""

BETWEEN = ("PRECALL", "CALL", "CALL_FUNCTION", "CALL_METHOD", "PUSH_NULL", "CACHE")
"""Instructions of Python 3.10 to 3.13 between ``x.size`` and the unpacking of what it returns."""


def attends(kind: type) -> bool:
    """Whether a method of the class calls a function that is attention."""
    return any(
        not ATTEND.isdisjoint(function.__code__.co_names)
        for function in map(inspect.unwrap, filter(callable, vars(kind).values()))
        if inspect.isfunction(function)
    )


def names(function: Callable[..., Any], attribute: str) -> bool:
    """Whether the function uses an attribute of that name."""
    function = inspect.unwrap(function)
    return inspect.isfunction(function) and attribute in function.__code__.co_names


def dims_of_argument(function: Callable[..., Any], argument: str) -> set[int]:
    """Into how many names the function unpacks the shape of an argument: {3} for ``B, N, C = x.shape``."""
    function = inspect.unwrap(function)
    if not inspect.isfunction(function):
        return set()
    instructions = [i for i in dis.get_instructions(function) if i.opname not in BETWEEN]
    return {
        int(unpack.arg or 0)
        for load, attribute, unpack in zip(instructions, instructions[1:], instructions[2:], strict=False)
        if unpack.opname == "UNPACK_SEQUENCE"
        and attribute.argval in ("shape", "size")
        and "LOAD_FAST" in load.opname
        and argument in (load.argval, *(load.argval[-1:] if isinstance(load.argval, tuple) else ()))
    }


def takes_maps(module: nn.Module) -> bool:
    """Whether a module is called with a map (B, C, rows, columns), by ``B, C, H, W = x.shape``."""
    argument = first_argument(module)
    return argument is not None and dims_of_argument(type(module).forward, argument) == {4}


def first_argument(module: nn.Module) -> str | None:
    return next(iter(inspect.signature(module.forward).parameters), None)
