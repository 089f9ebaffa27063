"""What the tests of README and documentation share: code, headings and links of a Markdown file."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^ *(`{3,}).*?^ *\1$\n?", re.DOTALL | re.MULTILINE)
SNIPPET = re.compile(r"^ *```python\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
INCLUDE = re.compile(r"^```{include} (\S+)$", re.MULTILINE)


def snippets(page: Path) -> list[str]:
    """The blocks marked as Python, each below as many empty lines as there are before it, for tracebacks."""
    text = page.read_text(encoding="utf-8")
    return ["\n" * text.count("\n", 0, m.start(1)) + dedent(m[1]) for m in SNIPPET.finditer(text)]


def named_block(page: Path, name: str) -> str:
    """The code block with this ``:name:``, of a page that does not run by itself."""
    found = re.search(rf"^:name: {name}\n\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert found is not None, f"{page} has no block {name!r}"
    return found[1]


def execute(page: Path, namespace: dict[str, Any]) -> None:
    """Runs the snippets of a page in order, in one namespace."""
    for snippet in snippets(page):
        exec(compile(snippet, str(page), "exec"), namespace)


def links(page: Path) -> list[tuple[str, str]]:
    """Targets and anchors, without the #, of the links and images that stay within the repository."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    targets = [target for target in re.findall(r'(?:\]\(|src=")([^)\s"]+)[)"]', text) if "://" not in target]
    return [(target.partition("#")[0], target.partition("#")[2]) for target in targets]


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, with those of the files that it includes."""
    text = page.read_text(encoding="utf-8")
    included = [anchors(page.parent / name) for name in INCLUDE.findall(text)]
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}.union(*included)


def table(page: Path, header: str) -> dict[str, list[str]]:
    """The rows of the one table of a page that has this header above its first column, by their first cells."""
    text = page.read_text(encoding="utf-8")
    (found,) = re.findall(rf"^\| {header} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines()]
    return {first: rest for first, *rest in rows}
