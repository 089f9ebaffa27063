"""Writes the README's section on speed from committed rows: ``python -m benchmarks.readme``, or ``--check``.

The section stands between two markers.  It shows the rows of a GPU where there are any, else those of the CPU.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.plot import RESULTS
from benchmarks.suite import milliseconds

BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
DIM = 384
MODES = ("forward", "forward+backward")
NOT_SHOWN = """What these numbers do not show: quality, because one layer does not stand for another without training;
other widths, dtypes and machines, where the ratios are others; a whole model, of which attention is a part
(`python -m benchmarks.model`). Weights and tokens are random. A ratio is that of medians of one run, in which all
layers met the same input in turn; below 1x ours is slower. Before anything is timed it is held against float64, and
what is wrong has no time. Memory is the peak of a call above weights and input.
[benchmarks/README.md](benchmarks/README.md) tells how to repeat it and what each row says."""
TITLES = {"dydila": "ours", "softmax": "softmax", "sana": "Sana"}


class Stale(RuntimeError):
    """The README does not say what the rows say."""


@dataclass(frozen=True)
class Config:
    """Write the README's section on speed from committed rows."""

    check: bool = False
    """Write nothing, and fail where the README differs from what the rows give."""
    readme: Path = harness.REPOSITORY / "README.md"
    """The file with the markers."""
    results: Path = RESULTS
    """Folder of the results, which has one for each device."""


def main(config: Config) -> None:
    """Raises ValueError where a marker, or a row that the section needs, is missing; Stale where the check fails."""
    old = config.readme.read_text(encoding="utf-8")
    before, after = around(old, config.readme)
    new = before + section(config.results) + after
    if not config.check:
        config.readme.write_text(new, encoding="utf-8")
    elif new != old:
        raise Stale(f"{config.readme} differs from the rows in {config.results}: run python -m benchmarks.readme")


def around(text: str, path: Path) -> tuple[str, str]:
    """What is before and behind the section, with the markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} must have one line {BEGIN} and, behind it, one line {END}")
    return text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]


def section(results: Path) -> str:
    """The section, made from the rows of one device."""
    folder = folder_of(results)
    rows = [row for row in harness.read_rows(folder / "layer.jsonl") if row["dim"] == DIM]
    if not any(row["name"] == "dydila" and not row["skipped"] for row in rows):
        raise ValueError(f"{folder / 'layer.jsonl'} has no time of ours at d = {DIM}")
    first = rows[0]
    link = f"benchmarks/results/{folder.name}"
    threads = f"{first['threads']} threads of an " if first["device_type"] == "cpu" else ""
    facts = f"{first['date'][:10]}, {threads}{first['device']}, {first['dtype']}, d = {DIM}"
    versions = f"commit {first['commit']}, torch {first['torch']}, Triton {first['triton']}"
    opening = (
        "**No GPU has been measured yet: these are times of the torch backend on a CPU.**"
        if first["device_type"] == "cpu"
        else "Forward times are those of CUDA graphs, which leave the host out."
    )
    introduction = (
        f"{opening} How many times as fast our layer is as a softmax layer of the same width, with heads of 64 "
        f"channels, and as Sana's ReLU linear attention, with as many heads as ours ({facts}; {versions}; "
        f"[rows]({link}/layer.jsonl)):"
    )
    picture = f"![Time, speed-up, share of the ceiling and memory against N]({link}/layer.png)"
    blocks = [
        textwrap.fill(introduction, 120, break_long_words=False, break_on_hyphens=False),
        "\n".join(speed_ups(rows)),
        "The most memory that a call takes, in MiB:",
        "\n".join(memory(rows)),
        picture,
        NOT_SHOWN,
    ]
    return "\n" + "\n\n".join(blocks) + "\n"


def folder_of(results: Path) -> Path:
    """That of the GPU measured last, else that of the CPU."""
    found = sorted(path.parent for path in results.glob("*/layer.jsonl"))
    if not found:
        raise ValueError(f"no layer.jsonl in the folders of {results}: run python -m benchmarks.layer")
    gpus = [folder for folder in found if folder.name != "cpu"]
    return max(gpus or found, key=lambda folder: harness.read_rows(folder / "layer.jsonl")[0]["date"])


def speed_ups(rows: Sequence[Row]) -> list[str]:
    """A table: the time of softmax, and of Sana, over ours, in each mode and with each number of heads of ours."""
    lines = heading(rows)
    for mode in MODES:
        for rival in ("softmax", "sana"):
            for ours in curves(rows, "dydila"):
                theirs = curves(rows, rival)
                same = ours if ours in theirs else next(iter(theirs), None)
                cells = []
                for tokens in sizes(rows):
                    above, below = find(rows, rival, same, mode, tokens), find(rows, "dydila", ours, mode, tokens)
                    cells.append(f"{milliseconds(above) / milliseconds(below):.3g}x" if above and below else "-")
                if set(cells) != {"-"}:
                    lines.append(f"| {mode}, over {TITLES[rival]}: {heads_of(ours)} | {' | '.join(cells)} |")
    return lines


def memory(rows: Sequence[Row]) -> list[str]:
    """A table: the peak of each layer in each mode."""
    lines = heading(rows)
    for mode in MODES:
        for name, title in TITLES.items():
            for heads in curves(rows, name):
                found = [find(rows, name, heads, mode, tokens) for tokens in sizes(rows)]
                cells = [f"{row['peak_mib']:,.0f}" if row and row.get("peak_mib") is not None else "-" for row in found]
                if set(cells) != {"-"}:
                    lines.append(f"| {mode}: {title}, {heads_of(heads)} | {' | '.join(cells)} |")
    return lines


def heading(rows: Sequence[Row]) -> list[str]:
    return [
        f"| tokens N | {' | '.join(f'{tokens:,}' for tokens in sizes(rows))} |",
        "|---" * (len(sizes(rows)) + 1) + "|",
    ]


def sizes(rows: Sequence[Row]) -> list[int]:
    return sorted({row["tokens"] for row in rows})


def curves(rows: Sequence[Row], name: str) -> list[int]:
    """The numbers of heads that a layer was measured with."""
    return sorted({row["heads"] for row in rows if row["name"] == name}, reverse=True)


def heads_of(number: int) -> str:
    return "1 head" if number == 1 else f"{number} heads"


def find(rows: Sequence[Row], name: str, heads: int | None, mode: str, tokens: int) -> Row | None:
    """The row of a layer, if it was measured."""
    wanted = {"name": name, "heads": heads, "mode": mode, "tokens": tokens, "skipped": None}
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (OSError, ValueError, Stale) as error:
        raise SystemExit(f"benchmarks.readme: {error}") from None
