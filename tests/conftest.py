from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, settings

from dydila_kernels.torch_backend import blocks

# Derandomised: the same examples in every run.  A first example may pay for imports and caches, hence no deadline.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def block_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the number of elements of a block, so that small images span several."""
    return lambda elements: monkeypatch.setattr(blocks, "CPU_BLOCK", elements)
