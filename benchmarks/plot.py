"""Pictures of stored rows, one for each suite and width: ``python -m benchmarks.plot benchmarks/results/cpu/*.jsonl``.

A panel has one curve for each contender, over N.  What was not measured leaves a gap in its curve.
"""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.suite import MODES, label, milliseconds

BASELINES = ("softmax", "dit")  # whom speed-ups are over: the first of these that a suite has
SMALLEST_SPAN = 6  # of a logarithmic axis, top over bottom: a smaller one would blow noise up into a shape
OURS = ("dydila", "dydi-lit")

# Told apart in grey by marker and line; colours after Okabe and Ito, for every kind of eye.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C3A", "#5D5D5D")
MARKERS = "sD^vPX<>p*hd"
LINES = ("--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))


class Quantity(NamedTuple):
    """What a panel shows of each row, by its ``key``; nothing where that is missing, None or 0."""

    key: str
    title: str
    logarithmic: bool = True
    line: float | None = None


QUANTITIES = (
    Quantity("ms", "time (ms)"),
    Quantity("speed_up", "times as fast as {baseline}", line=1),
    Quantity("percent_of_ceiling", "% of the ceiling", logarithmic=False),
    Quantity("peak_mib", "peak memory (MiB)"),
)


def main(rows: tyro.conf.Positional[tuple[Path, ...]] = (), out: Path | None = None) -> list[Path]:
    """Time, speed-up, percentage of the ceiling and memory against N, from stored rows.

    Args:
        rows: files of rows; by default all of benchmarks/results/*/.
        out: folder for the pictures; by default that of the rows.
    """
    files = rows or sorted(harness.RESULTS.glob("*/*.jsonl"))
    return [picture for path in files for picture in draw_all(harness.read_rows(path), out or path.parent)]


def draw_all(rows: Sequence[Row], folder: Path, *, widths: int | None = None) -> list[Path]:
    """Pictures SUITE.png of the width with most points, and SUITE-dWIDTH.png of others (up to ``widths`` in all)."""
    runs = [row for row in rows if "losses" in row]
    figures = {"training": draw_losses(runs)} if runs else {}
    compared = [row for row in rows if row["suite"] != "training" and "skipped" in row]
    for suite in dict.fromkeys(row["suite"] for row in compared):
        of_suite = [row for row in compared if row["suite"] == suite]
        dims = Counter(row.get("dim") for row in of_suite if not row["skipped"])
        for number, (dim, _) in enumerate(dims.most_common(widths)):
            name = f"{suite}-d{dim}" if number else suite
            figures[name] = draw([row for row in of_suite if row.get("dim") == dim])
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)
    return [folder / f"{name}.png" for name in figures]


def draw(rows: Sequence[Row]) -> Figure:
    """The picture of one suite and width: quantities downwards, modes (or stages) across."""
    baseline = next((name for name in BASELINES if any(row["name"] == name for row in rows)), None)
    rows = drawn(rows, baseline)
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    stages = list(dict.fromkeys(row["stage"] for row in rows if "stage" in row))
    quantities = [quantity for quantity in QUANTITIES if any(row.get(quantity.key) for row in rows)]
    # Stages are many: the sum of two modes that are shown goes without saying.
    downwards = ([mode for mode in modes if mode != MODES[-1]] or modes) if stages else [None]
    lines, columns = list(product(downwards, quantities)), stages or modes
    styles = styles_of(rows)
    figure = Figure(figsize=(max(3.4 * len(columns), 6.4), 2.4 * len(lines) + 1.3), layout="constrained")
    axes = figure.subplots(len(lines), len(columns), squeeze=False, sharex=True)
    for (i, (mode, quantity)), (j, column) in product(enumerate(lines), enumerate(columns)):
        in_column = [row for row in rows if row.get("stage", row["mode"]) == column]
        panel(axes[i, j], quantity, [row for row in in_column if mode in (None, row["mode"])], styles)
        axes[0, j].set_title(column, fontsize=10)
        title = quantity.title.format(baseline=baseline)
        axes[i, 0].set_ylabel(f"{mode}: {title}" if mode else title, fontsize=9)
    name_sizes(axes, rows)
    handles = {text: handle for ax in axes.flat for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    shown = [name for name in styles if name in handles]
    across = min(len(shown), int(figure.get_figwidth() / 2.2))
    places: dict[str, Any] = {"loc": "outside lower center", "ncols": across, "fontsize": 8, "handlelength": 4}
    figure.legend([handles[name] for name in shown], shown, **places)
    figure.suptitle(caption(rows), fontsize=10)
    return figure


def draw_losses(rows: Sequence[Row]) -> Figure:
    """Loss against the step, a panel for each size of the model, a thin line for each seed."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    colours: dict[str, str] = {}
    figure = Figure(figsize=(4.8 * len(sizes), 4), layout="constrained")
    axes = dict(zip(sizes, figure.subplots(1, len(sizes), squeeze=False)[0], strict=True))
    for row in rows:
        name = f"{row['name']}, {row['backend']}" if row["backend"] else row["name"]
        losses, window = row["losses"], max(len(row["losses"]) // 50, 1)
        means = [statistics.fmean(losses[max(i - window, 0) : i + 1]) for i in range(len(losses))]
        axes[row["size"]].plot(means, color=colours.setdefault(name, f"C{len(colours)}"), linewidth=0.9, label=name)
    for size, ax in axes.items():
        ax.set(title=size, xlabel="step", ylabel="loss, mean of the last 2 % of the steps", yscale="log")
        handles = dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
        ax.legend(handles=list(handles.values()), fontsize=8)
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}, commit {rows[0]['commit']}", fontsize=10)
    return figure


def drawn(rows: Sequence[Row], baseline: str | None) -> list[Row]:
    """The rows with what is drawn of them: ``label``, ``size`` (side of the image, or N), ``ms`` and ``speed_up``.

    The mode names the batch where one size was measured with several.
    """

    def place(row: Row) -> tuple[object, ...]:
        return tuple(row.get(key) for key in ("stage", "mode", "size", "batch"))

    found = [{**row, "label": label(row), "size": row["image" if "image" in row else "tokens"]} for row in rows]
    times: dict[object, float] = {}
    for row in found:
        if (row.get("peak_mib") or 0) <= 0:  # which has no logarithm; what a process takes may seem to fall
            row["peak_mib"] = None
        if not row["skipped"]:
            row["ms"] = milliseconds(row)
            if row["name"] == baseline:
                times[place(row)] = min(row["ms"], times.get(place(row), math.inf))  # of several heads
    for row in found:
        if "ms" in row and row["name"] != baseline and place(row) in times:
            row["speed_up"] = times[place(row)] / row["ms"]
    places = {(row["label"], *place(row)) for row in found}
    if len({place[:-1] for place in places}) < len(places):
        for row in found:
            row["mode"] += f", batch {row['batch']}"
    return found


def panel(axes: Axes, quantity: Quantity, rows: Sequence[Row], styles: dict[str, dict[str, Any]]) -> None:
    """One curve for each contender; NaN, which draws nothing, where it has no number."""
    sizes = sorted({row["size"] for row in rows})
    shown: list[float] = []
    for name, style in styles.items():
        values = {row["size"]: row[quantity.key] for row in rows if row["label"] == name and row.get(quantity.key)}
        if values:
            axes.plot(sizes, [values.get(size, math.nan) for size in sizes], label=name, markersize=5, **style)
            shown += values.values()
    if not shown:
        axes.set_axis_off()
        return
    if quantity.line is not None:
        axes.axhline(quantity.line, color="grey", linewidth=1)
        shown.append(quantity.line)
    axes.grid(alpha=0.3)
    axes.tick_params(which="both", axis="y", labelsize=8)
    if not quantity.logarithmic:
        axes.set_ylim(0, 1.1 * max(shown))
        return
    widen = max(1.25, math.sqrt(SMALLEST_SPAN * min(shown) / max(shown)))
    axes.set_yscale("log")
    axes.set_ylim(min(shown) / widen, max(shown) * widen)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_locator(NullLocator())


def name_sizes(axes: Any, rows: Sequence[Row]) -> None:
    """The sizes that were measured, on logarithmic axes, named below the lowest panel of each column that shows any."""
    sizes = sorted({row["size"] for row in rows})
    axes[-1, 0].set_xscale("log", base=2)
    axes[-1, 0].set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes[-1, 0].xaxis.set_minor_locator(NullLocator())
    for ax in axes.flat:
        ax.tick_params(axis="x", labelsize=8, rotation=30 if len(sizes) > 4 else 0)
    for ax in [[ax for ax in column if ax.axison][-1] for column in axes.T if any(ax.axison for ax in column)]:
        ax.set_xlabel("side of the image (pixels)" if "image" in rows[0] else "tokens N", fontsize=9)
        ax.tick_params(axis="x", labelbottom=True)


def styles_of(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """By label: ours black and solid, the others by name; hollow markers for one head."""
    names = list(dict.fromkeys(row["name"] for row in rows if row["name"] not in OURS))
    styles = {}
    for row in sorted(rows, key=lambda row: row["name"] not in OURS):
        style: dict[str, Any] = {"color": "#000000", "marker": "o", "linestyle": "-", "linewidth": 2.2, "zorder": 3}
        if row["name"] not in OURS:
            i = names.index(row["name"])
            looks = {"color": COLOURS[i % 8], "marker": MARKERS[i % 12], "linestyle": LINES[i % 5]}
            style = {**looks, "linewidth": 1.3, "zorder": 2}
        styles[label(row)] = style | {"fillstyle": "none" if row.get("heads") == 1 else "full"}
    return styles


def caption(rows: Sequence[Row]) -> str:
    first = rows[0]
    parts = [first["suite"], first["device"], first["dtype"]]
    parts += [f"d = {first['dim']}"] if "dim" in first else []
    parts += [f"{first['threads']} threads"] if first["device_type"] == "cpu" else []
    return ", ".join(parts) + f"\n{first['date'][:10]}, commit {first['commit']}, torch {first['torch']}"


if __name__ == "__main__":
    print(*tyro.cli(main), sep="\n")
