"""Arrows run one way: who may import whom within the package, read from the imports themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dydila_kernels"
FILES = sorted(PACKAGE.rglob("*.py"))

SHARED = {"precision", "types", "reference"}
"""What stands below both backends."""
MODULES = {"projection", "measure", "differential", "depthwise"}
"""The sub-modules that own the parameters."""
MAY_IMPORT = {
    "reference": set(),
    "types": set(),
    "precision": set(),
    "checks": {"types"},
    "torch_backend": SHARED,
    "ops": SHARED - {"reference"},
    "functional": {"checks", "precision", "types", "torch_backend", "ops"},
    "routers": {"checks"},
    "measure": {"routers"},
    "differential": {"routers"},
    "projection": {"precision", "routers", "torch_backend", "types"},
    "depthwise": {"checks", "torch_backend", "types"},
    "linear": {"checks", "precision", "torch_backend"},
    "thirds": {"checks", "linear", "torch_backend"},
    "routing": {"precision", "projection", "reference", "types", "attention"},  # the layer for its type alone
    "norms": {"checks"},
    "attention": {
        "checks",
        "functional",
        "linear",
        "norms",
        "precision",
        "routing",
        "thirds",
        "torch_backend",
        "types",
        *MODULES,
    },
    "distributed": {"attention", "checks", "linear", "precision", "torch_backend", "types"},
    "convert": {"attention", "checks", "norms"},
    "tuning": {"attention", "checks", "functional", "ops"},
    "testing": {"attention", "functional", "reference", "types"},
}
"""The arrows between parts, a part being a file or a folder of the package."""


def part_of(module: str) -> str:
    return module.removeprefix("dydila_kernels.").split(".")[0] if module.startswith("dydila_kernels.") else ""


def imports_of(path: Path) -> set[str]:
    """All modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path}: relative import"
            found.add(node.module)
            # "from dydila_kernels import x" is an import of the part x, where there is one.
            if node.module == "dydila_kernels":
                found |= {f"dydila_kernels.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    parts = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in FILES}
    inside = {part_of(name) for name in imports_of(path) if name.startswith("dydila_kernels.")} & parts
    if part not in ("__init__", "__main__"):
        assert inside - {part} <= MAY_IMPORT[part], (
            f"{part} must not import {sorted(inside - {part} - MAY_IMPORT[part])}"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_kernels_import_triton(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    outside = {name.split(".")[0] for name in imports_of(path)} & {"triton"}
    assert not outside or part in ("ops", "tuning")


def test_every_part_has_its_arrows_and_no_more() -> None:
    parts = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in FILES}
    assert set(MAY_IMPORT) == parts - {"__init__", "__main__"}
    for part, allowed in MAY_IMPORT.items():
        files = [file for file in FILES if file.relative_to(PACKAGE).parts[0].removesuffix(".py") == part]
        used = {part_of(name) for file in files for name in imports_of(file)}
        assert allowed <= used, f"{part} may import {sorted(allowed - used)}, and does not"


def test_no_file_is_long() -> None:
    """What a reader can hold in the head."""
    files = [*FILES, *sorted((ROOT / "tests").rglob("*.py"))]
    long = {str(file.relative_to(ROOT)): n for file in files if (n := len(file.read_text("utf-8").splitlines())) > 400}
    assert not long
