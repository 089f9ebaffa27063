"""The pictures show what was measured, and gaps where nothing was."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import harness, plot
from benchmarks.harness import Row
from tests.benchmarks.rows import row

ROWS = [
    *(row("dydila", n, n / 256) for n in (256, 1024, 4096)),
    *(row("dydila", n, n / 128, heads=1) for n in (256, 1024, 4096)),
    row("softmax", 256, 1.0), row("softmax", 1024, None), row("softmax", 4096, 256.0),
]  # fmt: skip


def curves(rows: list[Row], panel: int) -> dict[str, list[float]]:
    axes = plot.draw(rows).axes[panel]
    return {str(line.get_label()): list(line.get_ydata()) for line in axes.lines if line.get_label()[0] != "_"}


def test_what_was_not_measured_is_a_gap() -> None:
    times = curves(ROWS, 0)
    assert times["dydila H=2"] == [1, 4, 16] and times["dydila H=1"] == [2, 8, 32]
    assert times["softmax H=2"][0] == 1 and math.isnan(times["softmax H=2"][1]) and times["softmax H=2"][2] == 256


def test_speed_up_is_over_softmax_at_the_same_size() -> None:
    speed_up = curves(ROWS, 1)
    assert set(speed_up) == {"dydila H=2", "dydila H=1"}
    assert speed_up["dydila H=2"][::2] == [1, 16] and math.isnan(speed_up["dydila H=2"][1])


def test_the_time_of_a_graph_goes_before_that_of_a_call() -> None:
    assert curves([row("dydila", 64, 3.0, graph_median_ms=2.0)], 0)["dydila H=2"] == [2]


def test_curves_differ_in_grey_too() -> None:
    names = ["dydila", "softmax", "softmax flash", "softmax cudnn", "sana", "sana compiled", "focused", "dydila eager"]
    rows = [row(name, 64, 1.0, heads) for name in names for heads in (1, 2)]
    styles = plot.styles_of(rows)
    assert len({(s["marker"], s["linestyle"], s["fillstyle"]) for s in styles.values()}) == len(rows) == len(styles)


def test_the_title_says_where_and_when() -> None:
    title = plot.draw(ROWS).get_suptitle()
    assert all(fact in title for fact in ("a device", "float32", "d = 128", "2026-01-02", "0123456", "1 threads"))


def test_one_size_with_two_batches_takes_two_panels() -> None:
    rows = [row("dydila", 64, float(batch), batch=batch) for batch in (1, 2)]
    titles = [axes.get_title() for axes in plot.draw(rows).axes]
    assert titles[:2] == ["forward, batch 1", "forward, batch 2"]


def test_a_picture_for_each_suite_and_width(tmp_path: Path) -> None:
    stages = [row("dydila", n, 1.0, suite="stages", stage=s, mode=m) for n in (64, 256) for s in "ab" for m in MODES]
    other = [row("dydila", 64, 1.0, dim=256)]
    harness.write_rows(tmp_path / "rows.jsonl", [*ROWS, *stages, *other, {"suite": "sweep", "median_ms": 1.0}])
    pictures = plot.main((tmp_path / "rows.jsonl",), tmp_path / "out")
    assert [path.name for path in pictures] == ["layer.png", "layer-d256.png", "stages.png"]
    assert all(path.stat().st_size > 1000 for path in pictures)


MODES = ("forward", "backward", "forward+backward")


@pytest.mark.parametrize("memory", [None, 0.0, -0.13])
def test_no_memory_no_panel(memory: float | None) -> None:
    figure = plot.draw([row("dydila", 64, 1.0, peak_mib=memory)])
    assert [axes.get_ylabel() for axes in figure.axes] == ["time (ms)", "% of the ceiling"]
