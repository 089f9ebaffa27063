"""Speed-up of the layer over softmax attention against N, from stored rows: ``python -m benchmarks.plot``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from benchmarks import harness
from benchmarks.harness import Row


@dataclass(frozen=True)
class Config:
    """Speed-up of the layer over softmax attention against N, from stored rows."""

    rows: Path = harness.REPOSITORY / "benchmarks" / "results" / "cpu" / "layer.jsonl"
    """Rows of benchmarks.layer."""
    out: Path | None = None
    """The picture; by default the name of the rows, ending in .png."""


def speed_ups(rows: list[Row], mode: str, heads: int) -> dict[int, float]:
    """Softmax time over that of our layer with these heads, by N, where both were measured."""
    measured = [row for row in rows if row["mode"] == mode and not row["skipped"]]
    softmax = {row["tokens"]: row["median_ms"] for row in measured if row["layer"] == "softmax"}
    ours = {row["tokens"]: row["median_ms"] for row in measured if (row["layer"], row["heads"]) == ("dydila", heads)}
    return {n: softmax[n] / ours[n] for n in sorted(softmax.keys() & ours.keys())}


def main(config: Config) -> Path:
    """Draw the picture and return its path."""
    rows = harness.read_rows(config.rows)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for mode in sorted({row["mode"] for row in rows}):
        for heads in sorted({row["heads"] for row in rows if row["layer"] == "dydila"}):
            points = speed_ups(rows, mode, heads)
            axes.plot(list(points), list(points.values()), marker="o", label=f"{mode}, H = {heads}")
    axes.axhline(1, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens N")
    axes.set_ylabel("softmax time / our time")
    first = rows[0]
    axes.set_title(f"d = {first['dim']}, {first['dtype']}, {first['device']}, threads: {first['threads']}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    out = config.out or config.rows.with_suffix(".png")
    figure.savefig(out, dpi=150)
    return out


if __name__ == "__main__":
    print(main(tyro.cli(Config)))
