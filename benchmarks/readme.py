"""Writes the documentation's section on speed from committed rows: ``python -m benchmarks.readme``, or ``--check``.

The section stands between two markers, with the rows of a GPU where there are any, else those of the CPU.
"""

import os
import textwrap
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import tyro
from tabulate import tabulate

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.suite import milliseconds

PAGE = harness.REPOSITORY / "docs" / "guides" / "speed.md"
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
DIM = 384
MODES = ("forward", "forward+backward")
TITLES = {"dydila": "ours", "softmax": "softmax", "sana": "Sana"}


class Stale(RuntimeError):
    """The section does not say what the rows say."""


def main(check: bool = False, page: Path = PAGE, results: Path = harness.RESULTS) -> None:
    """Write the documentation's section on speed from committed rows.

    Args:
        check: write nothing, and fail where the section differs from what the rows give.
        page: the file with the markers.
        results: folder of the results, which has one for each device.
    """
    old = page.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise ValueError(f"{page} must have one line {BEGIN} and, behind it, one line {END}")
    new = old[: old.index(BEGIN) + len(BEGIN)] + section(results, page.parent) + old[old.index(END) :]
    if not check:
        page.write_text(new, encoding="utf-8")
    elif new != old:
        raise Stale(f"{page} differs from the rows in {results}: run python -m benchmarks.readme")


def section(results: Path, folder: Path) -> str:
    """The section, made from the rows of one device, for a page in ``folder``."""
    of_device = device_folder(results)
    rows = [row for row in harness.read_rows(of_device / "layer.jsonl") if row["dim"] == DIM]
    if not any(row["name"] == "dydila" and not row["skipped"] for row in rows):
        raise ValueError(f"{of_device / 'layer.jsonl'} has no time of ours at d = {DIM}")
    first, link = rows[0], Path(os.path.relpath(of_device, folder)).as_posix()
    threads, opening = "", "Forward times are those of CUDA graphs, which leave the host out."
    if first["device_type"] == "cpu":
        threads = f"{first['threads']} threads of an "
        opening = "**No GPU has been measured yet: these are times of the torch backend on a CPU.**"
    introduction = (
        f"{opening} How many times as fast our layer is as a softmax layer of the same width, with heads of 64 "
        f"channels, and as Sana's ReLU linear attention, with as many heads as ours ({first['date'][:10]}, {threads}"
        f"{first['device']}, {first['dtype']}, d = {DIM}; commit {first['commit']}, torch {first['torch']}, "
        f"Triton {first['triton']}; [rows]({link}/layer.jsonl)):"
    )
    speed_ups, memory = tables(rows)
    blocks = [
        textwrap.fill(introduction, 120, break_long_words=False, break_on_hyphens=False),
        speed_ups,
        "The most memory that a call takes, in MiB:",
        memory,
        f"![Time, speed-up, percentage of the ceiling and memory against N]({link}/layer.png)",
    ]
    return "\n" + "\n\n".join(blocks) + "\n"


def device_folder(results: Path) -> Path:
    """That of the GPU measured last, else that of the CPU."""
    found = sorted(path.parent for path in results.glob("*/layer.jsonl"))
    if not found:
        raise ValueError(f"no layer.jsonl in the folders of {results}: run python -m benchmarks.layer")
    gpus = [folder for folder in found if folder.name != "cpu"]
    return max(gpus or found, key=lambda folder: harness.read_rows(folder / "layer.jsonl")[0]["date"])


def tables(rows: Sequence[Row]) -> list[str]:
    """In Markdown, a column for each N: the time of softmax, and of Sana's layer, over ours; the peak memory of each.

    A line for each mode and number of heads, without those that have no number.
    """
    found = {(row["name"], row["heads"], row["mode"], row["tokens"]): row for row in rows if not row["skipped"]}
    heads = {name: sorted({row["heads"] for row in rows if row["name"] == name}, reverse=True) for name in TITLES}
    sizes = sorted({row["tokens"] for row in rows})
    speed_ups, memory = [], []
    for mode, rival, h in product(MODES, ("softmax", "sana"), heads["dydila"]):
        theirs = h if h in heads[rival] else next(iter(heads[rival]), None)
        pairs = [(found.get((rival, theirs, mode, n)), found.get(("dydila", h, mode, n))) for n in sizes]
        ratios = [f"{milliseconds(a) / milliseconds(b):.3g}x" if a and b else "-" for a, b in pairs]
        speed_ups.append([f"{mode}, over {TITLES[rival]}: {h} head{'s' * (h > 1)}", *ratios])
    for mode, (name, title) in product(MODES, TITLES.items()):
        for h in heads[name]:
            peaks = [found.get((name, h, mode, n), {}).get("peak_mib") for n in sizes]
            cells = ["-" if peak is None else f"{peak:,.0f}" for peak in peaks]
            memory.append([f"{mode}: {title}, {h} head{'s' * (h > 1)}", *cells])
    titles = ["tokens N", *(f"{n:,}" for n in sizes)]
    return [
        tabulate([line for line in lines if {*line[1:]} != {"-"}], titles, "github", disable_numparse=True)
        for lines in (speed_ups, memory)
    ]


if __name__ == "__main__":
    harness.told(lambda: tyro.cli(main), Stale)
