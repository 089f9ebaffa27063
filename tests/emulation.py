"""``pytest --emulate sm_90 tests/ops``: the tests of the kernels on compiled PTX, executed by :mod:`tools.ptx`.

Every launch is compiled for the GPU named and run on CPU tensors.  A test fails, too, for what the emulator's checks
find; fresh memory holds NaN; approximate instructions are wrong by ``--instruction-errors`` times the documented bound.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests import interpreter

TARGETS = ("sm_80", "sm_90", "sm_120")
emulation: Any = None
"""The :class:`tools.ptx.launching.Emulation` of this process, if it emulates."""
notes: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("emulation of a GPU")
    group.addoption("--emulate", choices=TARGETS, help="run the kernels compiled for this GPU, on the CPU")
    group.addoption(
        "--instruction-errors", type=float, default=1.0, metavar="SHARE",
        help="errors of approximate instructions, as a share of the documented bounds (default: 1)",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    target = config.getoption("--emulate")
    if target is None:
        return
    if not interpreter.AVAILABLE or interpreter.INTERPRETED:
        raise pytest.UsageError("--emulate needs Triton, and TRITON_INTERPRET=0 where it does not stand in sys.argv")
    from tools.ptx import approximate
    from tools.ptx.launching import Emulation

    global emulation
    emulation = Emulation(target)
    approximate.SHARE = config.getoption("--instruction-errors")
    hook()


def hook() -> None:
    """The library takes CPU tensors, and its launches go to the emulator."""
    from dydila_kernels import functional
    from dydila_kernels.ops import tiles

    refused = functional.why_not_triton

    @functools.wraps(refused)
    def why_not_triton(device: torch.device, *arguments: Any) -> str | None:
        # The meta device is refused nothing but what the kernels do not take.
        return refused(torch.device("meta") if device.type == "cpu" else device, *arguments)

    def launcher(kernel: Any, grid: tiles.Grid, config: Any, arguments: dict[str, Any]) -> None:
        emulation(kernel, grid, arguments, config.options)

    functional.why_not_triton = why_not_triton
    tiles.launcher = launcher


@pytest.fixture(autouse=True)
def emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails the test for what the checks find."""
    if emulation is None:
        yield
        return
    request.getfixturevalue("poisoned")
    emulation.report.clear()
    yield
    report = emulation.report
    notes.update(kind for kind in report.kinds(notes=True) if kind not in report.kinds())
    found = report.faults()
    assert not found, "\n".join(found[:10])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if emulation is None:
        return
    launches = emulation.report.launches
    terminalreporter.section(f"kernels emulated on sm_{emulation.target.arch}")
    terminalreporter.write_line(
        f"{launches.total()} launches of {len(emulation.compiled)} binaries {dict(notes) or ''}"
    )
    for name, count in sorted(launches.items()):
        terminalreporter.write_line(f"  {name}: {count} launches, {emulation.seconds[name]:.0f} s")
