"""Puts the rows of a GPU run where they are committed: ``python -m benchmarks.store DIR``."""

import shutil
from pathlib import Path

import tyro

from benchmarks import harness, plot
from benchmarks.gpu_run import ROWS, TESTS


def main(run: tyro.conf.Positional[Path], results: Path = harness.RESULTS) -> Path:
    """Puts the rows of each suite into RESULTS/DEVICE/SUITE.jsonl, in place of those that were there, and draws them.

    What the tests printed goes along.  Returns the device's folder.

    Args:
        run: folder that benchmarks.gpu_run filled.
        results: folder of the results, which has one for each device.
    """
    rows = harness.read_rows(run / ROWS)
    devices = {(row["device_type"], row["device"]) for row in rows if "device_type" in row}
    if len(devices) != 1:
        raise ValueError(f"{run / ROWS} must hold rows of one device; got {sorted(devices)}")
    ((kind, name),) = devices
    folder = harness.folder_of(kind, name, results)
    for suite in dict.fromkeys(row["suite"] for row in rows):
        harness.write_rows(folder / f"{suite}.jsonl", [row for row in rows if row["suite"] == suite])
    plot.draw_all(rows, folder)
    if (run / TESTS).exists():
        shutil.copy(run / TESTS, folder / TESTS)
    return folder


if __name__ == "__main__":
    print(harness.told(lambda: tyro.cli(main)))
