"""The form in Gluon: that it is taken, that it answers as the other does, and why it is not taken elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dydila_kernels.ops import tiles
from tests import emulation
from tests.ops.helpers import DEVICE, assert_repeats, compare_core, inputs_of
from tests.ops.test_tokens import shortfall

HALF = [torch.bfloat16, torch.float16]
needs_gluon = pytest.mark.skipif(tiles.INTERPRETED, reason="Gluon has no interpreter: run with --emulate, or on a GPU")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the kernels that a test launches."""
    names: set[str] = set()
    launcher = tiles.launcher

    def note(kernel: Any, *arguments: Any) -> None:
        names.add(kernel.__name__)
        launcher(kernel, *arguments)

    monkeypatch.setattr(tiles, "launcher", note)
    return names


@needs_gluon
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("normalization", ["length", "none"])
def test_error_is_that_of_plain_pytorch(dtype: torch.dtype, normalization: str, launched: set[str]) -> None:
    compare_core(dtype, 2, 128, 128, num_heads=2, normalization=normalization)
    assert {"gluon_tokens_kernel", "product_kernel"} <= launched
