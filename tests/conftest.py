from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from hypothesis import HealthCheck, settings

import tests.interpreter as interpreter  # before the package, which may import Triton
from dydila_kernels.torch_backend import blocks
from tests.emulation import (  # noqa: F401  hooks and a fixture
    emulated,
    pytest_addoption,
    pytest_configure,
    pytest_terminal_summary,
)

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


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory (``torch.empty`` and its kin) holds NaN, or the largest integer, instead of convenient zeros."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else deterministic algorithms warn on a GPU
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """What ``torch.compile`` made for other tests is forgotten, and what it makes for this one."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class NeedsTriton(pytest.Module):
    def collect(self) -> NoReturn:
        pytest.skip("Triton is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skips the tests of the kernels where there is no Triton, with a reason."""
    if module_path.parent.name == "ops" and not interpreter.AVAILABLE:
        return NeedsTriton.from_parent(parent, path=module_path)
    return None
