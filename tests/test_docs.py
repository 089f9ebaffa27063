"""The documentation runs, names all that is public, and leads nowhere wrong.  ``make docs`` builds it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dydila_kernels
from tests.markdown import ROOT, anchors, execute, links, snippets
from tools import draw_data_flow

SLOW = {"recipes.md": pytest.mark.slow, "replace_attention.md": pytest.mark.slow}  # torch.compile; diffusers
PAGES = sorted((ROOT / "docs").rglob("*.md"))
SKIPPED = {"build", "dist", "runs"}
MARKDOWN = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part in SKIPPED or part.startswith(".") for part in path.relative_to(ROOT).parts)
]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture
def as_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an empty folder, on one thread."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=SLOW.get(page.name, ())) for page in PAGES if snippets(page)],
    ids=name_of,
)
def test_snippets_run(page: Path, as_a_reader: None) -> None:
    for package in re.findall(r"^from (diffusers|peft|safetensors)\b", "\n".join(snippets(page)), re.MULTILINE):
        pytest.importorskip(package)
    execute(page, {"__name__": "__main__"})


def test_the_reference_has_every_public_name() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.parent.name == "api")
    documented = set(re.findall(r"^\.\. (?:autoclass|autofunction|py:data):: ([\w.]+)", text, re.MULTILINE))
    modules = set(re.findall(r"^\.\. automodule:: (\S+)$", text, re.MULTILINE))
    missing = {
        name
        for name in dydila_kernels.__all__
        if f"dydila_kernels.{name}" not in documented
        and getattr(getattr(dydila_kernels, name), "__module__", None) not in modules
    }
    assert not missing


@pytest.mark.parametrize("page", MARKDOWN, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in links(page):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(file), f"{target} has no heading #{anchor}"


SUPPORT = (ROOT / "docs" / "guides" / "support.md").read_text(encoding="utf-8")
NAMED_TEST = re.compile(r"`((?:\w+/)*test_\w+\.py)::([\w:]+)`")


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED_TEST.findall(SUPPORT)}))
def test_the_support_matrix_names_tests_that_there_are(file: str) -> None:
    source = (ROOT / "tests" / file).read_text(encoding="utf-8")
    for name in {part for named, path in NAMED_TEST.findall(SUPPORT) if named == file for part in path.split("::")}:
        assert re.search(rf"^ *(?:def|class) {name}\b", source, re.MULTILINE), f"{file} has no {name}"


def test_the_support_matrix_names_a_test_for_what_works() -> None:
    """In the cell, or for devices, whose cells are of one word, in the last of the row."""
    for line in SUPPORT.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for cell in cells:
            if re.match(r"(yes|error)\b", cell):
                where = cells[-1] if cell in ("yes", "error") else cell
                assert NAMED_TEST.search(where) or "the same test" in where, line


def test_the_picture_of_the_data_flow_is_drawn_by_its_script() -> None:
    assert draw_data_flow.PICTURE.read_text(encoding="utf-8") == draw_data_flow.draw()


def test_the_tutorial_is_stored_without_output() -> None:
    """``make docs`` runs it and shows what it prints then."""
    cells = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
