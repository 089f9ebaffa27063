"""The section on speed of the documentation says what the committed rows say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import harness, readme
from tests.benchmarks.rows import row

TEXT = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    """A page with markers, and rows of a CPU."""
    rows = [
        row("dydila", 1024, 2.0, dim=384), row("dydila", 1024, 4.0, heads=1, dim=384),
        row("softmax", 1024, 9.0, heads=6, dim=384), row("sana", 1024, 3.0, dim=384), row("dydila", 64, 1.0, dim=128),
    ]  # fmt: skip
    harness.write_rows(tmp_path / "results" / "cpu" / "layer.jsonl", rows)
    (tmp_path / "speed.md").write_text(TEXT)
    return {"page": tmp_path / "speed.md", "results": tmp_path / "results"}


def test_the_committed_section_is_that_of_the_committed_rows() -> None:
    readme.main(check=True)


def test_ratios_and_memory_come_from_the_rows(paths: dict[str, Path]) -> None:
    readme.main(**paths)
    text = re.sub(" +", " ", paths["page"].read_text())
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| forward, over softmax: 2 heads | 4.5x |" in text and "| forward, over softmax: 1 head | 2.25x |" in text
    assert "| forward, over Sana: 2 heads | 1.5x |" in text and "| forward: softmax, 6 heads | 90 |" in text
    assert "No GPU has been measured" in text and "2026-01-02" in text and "](results/cpu/layer.png)" in text
    assert max(map(len, paths["page"].read_text().splitlines())) <= 120
    readme.main(check=True, **paths)


def test_a_gpu_goes_before_the_cpu(paths: dict[str, Path]) -> None:
    rows = [row("dydila", 4096, 1.0, dim=384, device="a GPU", device_type="cuda")]
    harness.write_rows(paths["results"] / "a-gpu" / "layer.jsonl", rows)
    text = readme.section(paths["results"], paths["page"].parent)
    assert "a GPU" in text and "No GPU" not in text and "results/a-gpu/layer.png" in text


def test_a_changed_row_is_noticed(paths: dict[str, Path]) -> None:
    readme.main(**paths)
    path = paths["results"] / "cpu" / "layer.jsonl"
    rows = harness.read_rows(path)
    harness.write_rows(path, [{**rows[0], "median_ms": 3.0}, *rows[1:]])
    with pytest.raises(readme.Stale, match="run python -m"):
        readme.main(check=True, **paths)


@pytest.mark.parametrize("text", ["none", f"{readme.END}\n{readme.BEGIN}", f"{readme.BEGIN}\n" + TEXT])
def test_markers_are_asked_for(paths: dict[str, Path], text: str) -> None:
    paths["page"].write_text(text)
    with pytest.raises(ValueError, match="speed: begin"):
        readme.main(**paths)
    assert paths["page"].read_text() == text


def test_rows_are_asked_for(paths: dict[str, Path]) -> None:
    harness.write_rows(paths["results"] / "cpu" / "layer.jsonl", [row("dydila", 64, None, dim=384)])
    with pytest.raises(ValueError, match="no time of ours"):
        readme.main(**paths)
