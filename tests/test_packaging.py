"""What the files of the project say of versions agrees; ``tools/check_packages.py`` sees what is wrong with a wheel."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import pytest

import dydila_kernels
from tools import check_packages

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
INFO = "dydila_kernels-1.2.dist-info"
WHEEL = {
    "dydila_kernels/__init__.py": "",
    "dydila_kernels/py.typed": "",
    f"{INFO}/licenses/LICENSE": "",
    f"{INFO}/RECORD": "",
    f"{INFO}/top_level.txt": "dydila_kernels\n",
    f"{INFO}/WHEEL": "Root-Is-Purelib: true\nTag: py3-none-any\n",
    f"{INFO}/METADATA": "Version: 1.2\nLicense-Expression: Apache-2.0\nRequires-Dist: torch>=2.6\n"
    "Requires-Dist: einops\nRequires-Dist: triton; extra == 'triton'\n",
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_stands_in_one_place() -> None:
    assert check_packages.version() == dydila_kernels.__version__
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT


def test_every_extra_is_pinned() -> None:
    pinned = set(re.findall(r"^([\w-]+)==", read("requirements-dev.txt"), re.MULTILINE))
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *(text for name in extras if name != "triton" for text in extras[name])]
    assert {re.split(r"[^\w-]", text)[0] for text in asked} <= pinned
    makefile = read("Makefile")
    assert all(re.search(rf"'\.\[.*\b{name}\b.*\]'", makefile) for name in extras if name != "triton")


def test_the_supported_pythons_agree() -> None:
    classified = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert list(check_packages.PYTHONS) == classified
    oldest, newest = (int(version.partition(".")[2]) for version in (classified[0], classified[-1]))
    assert PROJECT["requires-python"] == f">=3.{oldest},<3.{newest + 1}"
    assert f"(3, {oldest}) <= v <= (3, {newest})" in read("Makefile")


def test_the_workflow_runs_ci_on_every_python() -> None:
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]
    assert {"run": ".ci/run"} in jobs["ci"]["steps"]
    (main,) = re.findall(r"python-version: \|\n(?: +[\d.]+\n)* +([\d.]+)\n", read(".github/workflows/ci.yml"))
    assert sorted([main, *jobs["pythons"]["strategy"]["matrix"]["python"]]) == list(check_packages.PYTHONS)


def test_workflows_run_what_there_is_and_write_nothing_by_default() -> None:
    yaml = pytest.importorskip("yaml")
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert {file.stem for file in files} == {"ci", "docs", "nightly", "release"}
    for file in files:
        workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert workflow["permissions"] == {"contents": "read"}, file.name
        commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
        for target in re.findall(r"^make ([\w-]+)", "\n".join(commands), re.MULTILINE):
            assert f"\n{target}:" in read("Makefile"), f"{file.name}: make {target}"


@pytest.mark.parametrize(
    "name", [".pre-commit-config.yaml", "CITATION.cff", ".github/dependabot.yml", ".github/ISSUE_TEMPLATE/bug.yml",
             ".github/ISSUE_TEMPLATE/config.yml", ".github/ISSUE_TEMPLATE/feature.yml"]
)  # fmt: skip
def test_other_files_are_yaml(name: str) -> None:
    assert isinstance(pytest.importorskip("yaml").safe_load(read(name)), dict)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"tests/test_masks.py": ""}, r"should not have \['tests/test_masks.py'\]"),
        ({"dydila_kernels/py.typed": None}, r"lacks \['dydila_kernels/py.typed'\]"),
        ({f"{INFO}/licenses/LICENSE": None}, "lacks .*LICENSE"),
        ({f"{INFO}/METADATA": WHEEL[f"{INFO}/METADATA"].replace("1.2", "1.3")}, "has version 1.3, not 1.2"),
        ({f"{INFO}/METADATA": WHEEL[f"{INFO}/METADATA"].replace("einops", "scipy")}, r"lacks \['einops'\]"),
        ({f"{INFO}/METADATA": WHEEL[f"{INFO}/METADATA"].replace("Apache-2.0", "MIT")}, "license MIT"),
        ({f"{INFO}/WHEEL": "Root-Is-Purelib: true\nTag: cp311-cp311-linux_x86_64\n"}, "not pure Python"),
    ],
    ids=["right", "tests", "py.typed", "licence file", "version", "requirement", "licence", "tag"],
)
def test_a_wrong_wheel_is_seen(changes: dict[str, str | None], words: str | None, tmp_path: Path) -> None:
    wheel, files = tmp_path / "some.whl", {"dydila_kernels/__init__.py", "dydila_kernels/py.typed", "README.md"}
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {**WHEEL, **changes}.items():
            if text is not None:
                archive.writestr(name, text)
    if words is None:
        check_packages.check_wheel(wheel, "1.2", files)
    else:
        with pytest.raises(SystemExit, match=words):
            check_packages.check_wheel(wheel, "1.2", files)
