"""Several processes, and the gradients that they have."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import tests.interpreter  # noqa: F401  (before the package, which may import Triton)

CLOSE = {"rtol": 1e-9, "atol": 1e-10}  # float64, sums in another order


def run(rank: int, size: int, port: int, function: Callable[..., None], *arguments: Any) -> None:
    """One of the processes that :func:`on_ranks` starts, in an environment as torchrun's."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(150, exit=True)  # rather than to wait for each other for ever
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    function(*arguments)


def on_ranks(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Runs a function in as many processes, which fork from one that has imported this module."""
    multiprocessing.set_forkserver_preload(["tests.ranks"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        run, (size, port, function, *arguments), nprocs=size, start_method="forkserver"
    )


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
