"""Puts the rows of a GPU run where they are committed: ``python -m benchmarks.store DIR``.

DIR is what ``benchmarks.gpu_run --out`` filled.  Each suite's rows go to benchmarks/results/DEVICE/SUITE.jsonl, in
place of those that were there, and their pictures beside them; what the tests printed goes along.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks import harness, plot
from benchmarks.gpu_run import ROWS, TESTS


@dataclass(frozen=True)
class Config:
    """Put the rows of a GPU run where they are committed, and draw them."""

    run: tyro.conf.Positional[Path]
    """Folder that benchmarks.gpu_run filled."""
    results: Path = plot.RESULTS
    """Folder of the results, which has one for each device."""


def main(config: Config) -> Path:
    """Stores and draws; returns the device's folder.  ValueError where the run has no rows of a device."""
    rows = harness.read_rows(config.run / ROWS)
    devices = {(row["device_type"], row["device"]) for row in rows if "device_type" in row}
    if len(devices) != 1:
        raise ValueError(f"{config.run / ROWS} must hold rows of one device; got {sorted(devices)}")
    ((kind, name),) = devices
    folder = config.results / harness.folder_name(kind, name)
    for suite in dict.fromkeys(row["suite"] for row in rows):
        harness.write_rows(folder / f"{suite}.jsonl", [row for row in rows if row["suite"] == suite])
    plot.draw_all(rows, folder)
    if (config.run / TESTS).exists():
        shutil.copy(config.run / TESTS, folder / TESTS)
    return folder


if __name__ == "__main__":
    try:
        print(main(tyro.cli(Config)))
    except (OSError, ValueError) as error:
        raise SystemExit(f"benchmarks.store: {error}") from None
