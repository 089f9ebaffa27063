"""Fixtures of the tests of training; they import the example late, so that it may be missing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The configuration of a run that takes a second; see `training.small_run`."""
    from tests.dydi_lit.training import small_run

    return small_run(monkeypatch, tmp_path)


@pytest.fixture
def other_precision() -> Iterator[None]:
    """accelerate computes in one precision for the rest of the process, unless it is made to forget it."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
