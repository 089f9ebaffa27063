"""The section on speed of the documentation says what the committed rows say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import harness, readme
from tests.benchmarks.rows import row

TEXT = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"


@pytest.fixture
def config(tmp_path: Path) -> readme.Config:
    """A page with markers, and rows of a CPU."""
    rows = [
        row("dydila", 1024, 2.0, dim=384), row("dydila", 1024, 4.0, heads=1, dim=384),
        row("softmax", 1024, 9.0, heads=6, dim=384), row("sana", 1024, 3.0, dim=384), row("dydila", 64, 1.0, dim=128),
    ]  # fmt: skip
    harness.write_rows(tmp_path / "results" / "cpu" / "layer.jsonl", rows)
    (tmp_path / "speed.md").write_text(TEXT)
    return readme.Config(page=tmp_path / "speed.md", results=tmp_path / "results")


def check(config: readme.Config) -> readme.Config:
    return readme.Config(check=True, page=config.page, results=config.results)


def test_the_committed_section_is_that_of_the_committed_rows() -> None:
    readme.main(readme.Config(check=True))


def test_ratios_and_memory_come_from_the_rows(config: readme.Config) -> None:
    readme.main(config)
    text = re.sub(" +", " ", config.page.read_text())
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| forward, over softmax: 2 heads | 4.5x |" in text and "| forward, over softmax: 1 head | 2.25x |" in text
    assert "| forward, over Sana: 2 heads | 1.5x |" in text and "| forward: softmax, 6 heads | 90 |" in text
    assert "No GPU has been measured" in text and "2026-01-02" in text and "](results/cpu/layer.png)" in text
    assert max(map(len, config.page.read_text().splitlines())) <= 120
    readme.main(check(config))


def test_a_gpu_goes_before_the_cpu(config: readme.Config) -> None:
    rows = [row("dydila", 4096, 1.0, dim=384, device="a GPU", device_type="cuda")]
    harness.write_rows(config.results / "a-gpu" / "layer.jsonl", rows)
    text = readme.section(config.results, config.page.parent)
    assert "a GPU" in text and "No GPU" not in text and "results/a-gpu/layer.png" in text


def test_a_changed_row_is_noticed(config: readme.Config) -> None:
    readme.main(config)
    path = config.results / "cpu" / "layer.jsonl"
    rows = harness.read_rows(path)
    harness.write_rows(path, [{**rows[0], "median_ms": 3.0}, *rows[1:]])
    with pytest.raises(readme.Stale, match="run python -m"):
        readme.main(check(config))


@pytest.mark.parametrize("text", ["none", f"{readme.END}\n{readme.BEGIN}", f"{readme.BEGIN}\n" + TEXT])
def test_markers_are_asked_for(config: readme.Config, text: str) -> None:
    config.page.write_text(text)
    with pytest.raises(ValueError, match="speed: begin"):
        readme.main(config)
    assert config.page.read_text() == text


def test_rows_are_asked_for(config: readme.Config) -> None:
    harness.write_rows(config.results / "cpu" / "layer.jsonl", [row("dydila", 64, None, dim=384)])
    with pytest.raises(ValueError, match="no time of ours"):
        readme.main(config)
