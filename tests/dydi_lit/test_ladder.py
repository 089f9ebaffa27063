"""Table 4 at toy size: runs are paired, kept, and shown as they are."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("examples.dydi_lit")

from benchmarks.harness import read_rows
from examples.dydi_lit import ladder, throughput
from examples.dydi_lit.configs import LADDER, TITLES
from examples.dydi_lit.ladder import COMPARED_WITH, LadderConfig, Run

EXAMPLE = Path(__file__).parents[2] / "examples" / "dydi_lit"
COMMITTED = EXAMPLE / "results" / "ladder.csv"


def result(model: str, seed: int, held_out: float) -> Run:
    return Run(model, seed, "digits", "toy", 700, held_out, 0.05, 60.0, torch.__version__)  # type: ignore[arg-type]


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = [result("sana", 0, 0.1), result("dydi-lit", 0, 1 / 3)]
    for row in rows:
        ladder.append_run(tmp_path / "new" / "ladder.csv", row)
    assert ladder.read_runs(tmp_path / "new" / "ladder.csv") == rows
    assert ladder.read_runs(tmp_path / "none.csv") == []


def test_differences_are_taken_between_runs_of_one_seed() -> None:
    rows = [result("sana", seed, error) for seed, error in enumerate([0.050, 0.060, 0.070])]
    rows += [result("focused-kernel", seed, error) for seed, error in enumerate([0.051, 0.062, 0.069])]
    rows += [result("map-differential", 0, 0.04)]
    lines = ladder.table(rows).splitlines()[2:]
    assert lines[0].startswith("| Sana | 3 | 60.0 ± 10.0 |  |")
    assert lines[1] == "| + focused kernel | 3 | 60.7 ± 9.1 | Sana | +0.7 ± 1.5 | 2/3 |"
    assert lines[2].startswith("| attention map-wise paradigm | 1 | 40.0 |  |")  # what it varies has not been run


def test_the_picture_shows_every_run_and_the_spread(tmp_path: Path) -> None:
    rows = [result("sana", seed, error) for seed, error in enumerate([0.050, 0.060, 0.070])]
    rows += [result("dydi-lit", 0, 0.04)]
    (axes,) = ladder.picture(rows).axes
    shown = [sorted(line.get_xdata().tolist()) for line in axes.lines if line.get_marker() == "o"]
    assert [[round(value, 6) for value in line] for line in shown] == [[50, 60, 70], [40]]
    bars = [bar.lines[2][0].get_segments()[0][:, 0] for bar in axes.containers]
    assert [[round(end, 6) for end in bar] for bar in bars] == [[50, 70], [40, 40]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Sana", "+ reparameterization (DyDi-LiT)"]
    assert axes.yaxis_inverted()


def test_every_row_but_the_first_is_compared() -> None:
    assert set(TITLES) - set(COMPARED_WITH) == {"sana"}
    assert [COMPARED_WITH[model] for model in LADDER[1:]] == list(LADDER[:-1])


@pytest.mark.slow
def test_a_small_ladder_runs_and_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LadderConfig(output=tmp_path, models=("sana", "dydi-lit"), seeds=1, steps=3, workers=1)
    rows = ladder.ladder(config)
    assert {row.model for row in rows} == {"sana", "dydi-lit"} and len(rows) == 2
    assert all(0.9 < row.held_out < 1.1 and row.seconds > 0 for row in rows)  # three steps teach next to nothing
    assert ladder.read_runs(tmp_path / "ladder.csv") == rows
    monkeypatch.setattr(ladder, "run", None)
    assert ladder.ladder(config) == rows
    assert ladder.ladder(dataclasses.replace(config, models=("sana",))) == [row for row in rows if row.model == "sana"]


def shown_in_the_readme(name: str) -> str:
    text = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name} -->\n\n(.*?)\n\n", text, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_table_of_twins_is_that_of_the_committed_runs() -> None:
    rows = ladder.read_runs(EXAMPLE / "results" / "twins.csv")
    assert shown_in_the_readme("twins") == ladder.table(rows)
    assert {(row.data, row.size, row.steps) for row in rows} == {("twins", "toy", 3000)}


def test_the_table_of_throughput_is_that_of_the_committed_rows() -> None:
    rows = read_rows(EXAMPLE / "results" / "throughput.jsonl")
    assert shown_in_the_readme("throughput") == throughput.table(rows)
    assert [row["model"] for row in rows] == list(throughput.MODELS)


def test_the_table_of_the_readme_is_that_of_the_committed_runs() -> None:
    rows = ladder.read_runs(COMMITTED)
    assert shown_in_the_readme("ladder") == ladder.table(rows)
    assert {row.model for row in rows} == set(LadderConfig().models) and {row.seed for row in rows} == {0, 1, 2}
