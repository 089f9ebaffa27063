from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the kernels that a test launches."""
    from dydila_kernels.ops import tiles  # which imports Triton

    names: set[str] = set()
    launcher = tiles.launcher

    def note(kernel: Any, *arguments: Any) -> None:
        names.add(kernel.__name__)
        launcher(kernel, *arguments)

    monkeypatch.setattr(tiles, "launcher", note)
    return names
