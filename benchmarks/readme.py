"""Writes the documentation's section on speed from committed rows: ``python -m benchmarks.readme``, or ``--check``.

The section stands between two markers.  It shows the rows of a GPU where there are any, else those of the CPU.
"""

from __future__ import annotations

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
NOT_SHOWN = """What these numbers do not show: quality, because one layer does not stand for another without training;
other widths, dtypes and machines, where the ratios are others; a whole model, of which attention is a part
(`python -m benchmarks.model`). Weights and tokens are random. A ratio is that of medians of one run, in which all
layers met the same input in turn; below 1x ours is slower. Before anything is timed it is held against float64, and
what is wrong has no time. Memory is the peak of a call above weights and input.
[benchmarks/README.md]({}/README.md) tells how to repeat it and what each row says."""
TITLES = {"dydila": "ours", "softmax": "softmax", "sana": "Sana"}


class Stale(RuntimeError):
    """The section does not say what the rows say."""


def main(check: bool = False, page: Path = PAGE, results: Path = harness.RESULTS) -> None:
    """Write the documentation's section on speed from committed rows.

    Args:
        check: write nothing, and fail where the section differs from what the rows give.
        page: the file with the markers.
        results: folder of the results, which has one for each device.

    Raises:
        ValueError: a marker, or a row that the section needs, is missing.
        Stale: the check fails.
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
    first = rows[0]
    on_cpu = first["device_type"] == "cpu"
    link = Path(os.path.relpath(of_device, folder)).as_posix()
    threads = f"{first['threads']} threads of an " if on_cpu else ""
    facts = f"{first['date'][:10]}, {threads}{first['device']}, {first['dtype']}, d = {DIM}"
    versions = f"commit {first['commit']}, torch {first['torch']}, Triton {first['triton']}"
    on_gpu = "Forward times are those of CUDA graphs, which leave the host out."
    opening = "**No GPU has been measured yet: these are times of the torch backend on a CPU.**" if on_cpu else on_gpu
    introduction = (
        f"{opening} How many times as fast our layer is as a softmax layer of the same width, with heads of 64 "
        f"channels, and as Sana's ReLU linear attention, with as many heads as ours ({facts}; {versions}; "
        f"[rows]({link}/layer.jsonl)):"
    )
    blocks = [
        textwrap.fill(introduction, 120, break_long_words=False, break_on_hyphens=False),
        speed_ups(rows),
        "The most memory that a call takes, in MiB:",
        memory(rows),
        f"![Time, speed-up, percentage of the ceiling and memory against N]({link}/layer.png)",
        NOT_SHOWN.format(Path(os.path.relpath(harness.REPOSITORY / "benchmarks", folder)).as_posix()),
    ]
    return "\n" + "\n\n".join(blocks) + "\n"


def device_folder(results: Path) -> Path:
    """That of the GPU measured last, else that of the CPU."""
    found = sorted(path.parent for path in results.glob("*/layer.jsonl"))
    if not found:
        raise ValueError(f"no layer.jsonl in the folders of {results}: run python -m benchmarks.layer")
    gpus = [folder for folder in found if folder.name != "cpu"]
    return max(gpus or found, key=lambda folder: harness.read_rows(folder / "layer.jsonl")[0]["date"])


def speed_ups(rows: Sequence[Row]) -> str:
    """A table: time of softmax, and of Sana's layer, over ours, in each mode and with each number of heads of ours."""
    lines: dict[str, list[str]] = {}
    for mode, rival, heads in product(MODES, ("softmax", "sana"), heads_of(rows, "dydila")):
        theirs = heads_of(rows, rival)
        above = curve(rows, rival, heads if heads in theirs else next(iter(theirs), None), mode)
        below = curve(rows, "dydila", heads, mode)
        pairs = zip(above, below, strict=True)
        ratios = [f"{milliseconds(a) / milliseconds(b):.3g}x" if a and b else "-" for a, b in pairs]
        lines[f"{mode}, over {TITLES[rival]}: {counted(heads)}"] = ratios
    return table(rows, lines)


def memory(rows: Sequence[Row]) -> str:
    """A table: the peak of each layer in each mode."""
    lines: dict[str, list[str]] = {}
    for mode, (name, title) in product(MODES, TITLES.items()):
        for heads in heads_of(rows, name):
            peaks = [row and row.get("peak_mib") for row in curve(rows, name, heads, mode)]
            lines[f"{mode}: {title}, {counted(heads)}"] = ["-" if p is None else f"{p:,.0f}" for p in peaks]
    return table(rows, lines)


def table(rows: Sequence[Row], lines: dict[str, list[str]]) -> str:
    """In Markdown, a column for each N; without lines that have no number."""
    shown = [[title, *cells] for title, cells in lines.items() if {*cells} != {"-"}]
    return tabulate(shown, ["tokens N", *(f"{n:,}" for n in sizes(rows))], "github", disable_numparse=True)


def sizes(rows: Sequence[Row]) -> list[int]:
    return sorted({row["tokens"] for row in rows})


def heads_of(rows: Sequence[Row], name: str) -> list[int]:
    """The numbers of heads that a layer was measured with."""
    return sorted({row["heads"] for row in rows if row["name"] == name}, reverse=True)


def counted(heads: int) -> str:
    return "1 head" if heads == 1 else f"{heads} heads"


def curve(rows: Sequence[Row], name: str, heads: int | None, mode: str) -> list[Row | None]:
    """The rows of a layer over N, None where it was not measured."""
    wanted = {"name": name, "heads": heads, "mode": mode, "skipped": None}
    found = {row["tokens"]: row for row in rows if wanted.items() <= row.items()}
    return [found.get(tokens) for tokens in sizes(rows)]


if __name__ == "__main__":
    harness.told(lambda: tyro.cli(main), Stale)
