"""Builds the wheel and the sdist, reads them, and installs the wheel in new environments; ``make packages`` runs it.

In an environment without torch, of each Python found, the wheel must install, compile, name what is missing, and leave
nothing when it goes.  In one that borrows the packages of the environment that runs this, with Triton and without, it
must compute.  ``--torch VERSION`` downloads that torch into a new environment of each Python, with all that it needs.
"""

from __future__ import annotations

import argparse
import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
NEEDED = {"einops", "torch"}
"""What the wheel asks for, extras apart."""

SELF_TEST = """
import pathlib, sys, torch, dydila_kernels
assert pathlib.Path(dydila_kernels.__file__).resolve().is_relative_to(pathlib.Path(sys.prefix).resolve())
layer, x = dydila_kernels.DyDiLAttention(32, 2), torch.randn(2, 16, 32, requires_grad=True)
layer(x).square().mean().backward()
assert all(t.grad.isfinite().all() and t.grad.any() for t in (x, layer.qkv.weight, layer.measure.gamma))
"""
SUBJECTS = ("attention", "compile", "errors", "import", "masks", "packing", "state_dict", "transforms")
TESTS = [f"tests/test_{subject}.py" for subject in SUBJECTS]
"""Those that ``--tests`` runs if it names none."""


def fail(message: str) -> None:
    sys.exit(f"FAILED: {message}")


def expect(holds: object, message: str) -> None:
    if not holds:
        fail(message)


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None, ok: bool = True) -> str:
    """The output of a command, which must succeed, or fail if not ``ok``."""
    done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    expect((done.returncode == 0) == ok, f"{' '.join(map(str, command))} returned {done.returncode}\n{done.stdout}")
    return done.stdout


def version() -> str:
    """``__version__``, the one place that has it, and the heading of the changelog that goes with it."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "dydila_kernels/__init__.py").read_text("utf-8"), re.MULTILINE)
    assert found is not None
    heading = f"## [{found[1]}] - "
    expect(f"\n{heading}" in (ROOT / "CHANGELOG.md").read_text("utf-8"), f"CHANGELOG.md has no heading '{heading}'")
    return found[1]


def repository() -> set[str]:
    """The files of the working tree that git does not ignore."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    return {name for name in listed if (ROOT / name).exists()}


def build(out: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it, in ``out``."""
    for old in out.glob("dydila_kernels-*"):
        old.unlink()
    run(sys.executable, "-m", "build", "--outdir", out, ROOT)
    run(sys.executable, "-m", "twine", "check", "--strict", *out.glob("dydila_kernels-*"))
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def same_names(what: str, names: Iterable[str], expected: Iterable[str]) -> None:
    missing, more = set(expected) - set(names), set(names) - set(expected)
    expect(not missing and not more, f"{what} lacks {sorted(missing)} and should not have {sorted(more)}")


def check_sdist(sdist: Path, files: set[str]) -> None:
    """It holds the repository, whole, and what setuptools writes."""
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    own = {name for name in names if name.startswith("dydila_kernels.egg-info/")}
    same_names(sdist.name, names - own - {"PKG-INFO", "setup.cfg"}, files)


def check_wheel(wheel: Path, release: str, files: set[str]) -> None:
    """It holds the package and nothing else, for any Python 3, and says what it needs."""
    info = f"dydila_kernels-{release}.dist-info"
    written = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE", "top_level.txt")}
    with zipfile.ZipFile(wheel) as archive:
        package = {name for name in files if name.startswith("dydila_kernels/")}
        same_names(wheel.name, archive.namelist(), package | written)
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        tags = email.message_from_bytes(archive.read(f"{info}/WHEEL"))
    expect(metadata["Version"] == release, f"{wheel.name} has version {metadata['Version']}, not {release}")
    expect(metadata["License-Expression"] == "Apache-2.0", f"license {metadata['License-Expression']}")
    expect((tags["Root-Is-Purelib"], tags["Tag"]) == ("true", "py3-none-any"), f"{wheel.name} is not pure Python")
    asked = [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]
    same_names("Requires-Dist", [re.split(r"[^\w-]", text)[0] for text in asked], NEEDED)


class Environment:
    """A new virtual environment, and a folder outside of the repository to run in."""

    def __init__(self, python: str | Path, folder: Path) -> None:
        self.folder, self.elsewhere = folder / "environment", folder / "elsewhere"
        self.elsewhere.mkdir(parents=True)
        run(python, "-m", "venv", self.folder)
        self.python = self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        # Neither the packages nor the settings of the environment around it.
        self.env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}

    def run(self, *arguments: str | Path, ok: bool = True) -> str:
        return run(self.python, *arguments, cwd=self.elsewhere, env=self.env, ok=ok)

    def pip(self, *arguments: str | Path, ok: bool = True) -> str:
        return self.run("-m", "pip", "--disable-pip-version-check", *arguments, ok=ok)

    def install(self, wheel: Path, *options: str) -> set[Path]:
        """Adds the wheel, which must bring and replace nothing; returns the files that were there before."""
        before, packages = set(self.folder.rglob("*")), self.pip("freeze").splitlines()
        self.pip("install", *options, wheel)
        now = self.pip("freeze").splitlines()
        others = [line for line in now if not line.startswith("dydila-kernels @ ")]
        expect(others == packages and len(now) == len(packages) + 1, f"the wheel changed {packages} into {others}")
        return before

    def uninstall(self, before: set[Path]) -> None:
        self.pip("uninstall", "--yes", "dydila-kernels")
        left = sorted(str(path) for path in set(self.folder.rglob("*")) - before)
        expect(not left, f"uninstalling left {left}")

    def compute(self) -> None:
        self.run("-W", "error:::dydila_kernels", "-c", SELF_TEST)
        self.run("-m", "dydila_kernels")


def check_without_torch(environment: Environment, wheel: Path) -> None:
    """The files suit this Python; pip and the import say what is missing."""
    before = environment.install(wheel, "--no-deps")
    package = next(environment.folder.rglob("dydila_kernels"))
    environment.run("-m", "compileall", "-q", "-f", package)
    report = environment.pip("check", ok=False)
    same_names("`pip check`", re.findall(r"requires ([\w-]+), which is not installed", report), NEEDED)
    said = environment.run("-c", "import dydila_kernels", ok=False).splitlines()[-1]
    expect(said == "ModuleNotFoundError: No module named 'torch'", f"the import says {said}")
    environment.uninstall(before)


def check_borrowing(environment: Environment, wheel: Path, triton: bool) -> None:
    """With the packages of the environment that runs this, Triton among them or not."""
    before = environment.install(wheel, "--no-deps")
    borrowed = environment.elsewhere.parent / "borrowed"
    borrowed.mkdir()
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(site).iterdir():
            if triton or not entry.name.startswith("triton"):
                (borrowed / entry.name).symlink_to(entry)
    environment.env["PYTHONPATH"] = str(borrowed)
    environment.compute()
    del environment.env["PYTHONPATH"]
    environment.uninstall(before)


def check_with_torch(environment: Environment, wheel: Path, sdist: Path, torch: str, tests: list[str]) -> None:
    """With a torch of its own; then the tests of the sdist, and once more without Triton."""
    environment.pip("install", "--no-cache-dir", f"torch=={torch}", *sorted(NEEDED - {"torch"}))
    if tests:
        environment.pip("install", "pytest", "hypothesis", "numpy")  # Triton's interpreter imports numpy
    before = environment.install(wheel)
    environment.pip("check")
    environment.compute()
    if tests:
        shutil.unpack_archive(sdist, environment.elsewhere)
        (tree,) = environment.elsewhere.iterdir()
        shutil.rmtree(tree / "dydila_kernels")  # the tests find the wheel's
        done = run(environment.python, "-m", "pytest", "-q", "-m", "not slow", *tests, cwd=tree, env=environment.env)
        print(f"  {done.splitlines()[-1]}")
    if "triton" in environment.pip("freeze"):
        environment.pip("uninstall", "--yes", "triton")
        environment.compute()
    environment.uninstall(before)


def interpreters() -> Iterator[str]:
    """One Python of each supported version: from the path, or else pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    for wanted in PYTHONS:
        found = [shutil.which(f"python{wanted}"), *sorted(map(str, pyenv.glob(f"{wanted}.*/bin/python")))]
        for python in filter(None, found):
            if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:  # a shim of pyenv may refuse
                yield python
                break
        else:
            print(f"Python {wanted} is not here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where wheel and sdist go (default dist/)")
    parser.add_argument("--python", nargs="+", default=None, help="interpreters (default: one of each version found)")
    parser.add_argument("--torch", nargs="+", default=[], help="versions of torch to download, several GB each")
    parser.add_argument("--tests", nargs="*", help="with --torch: also run tests, these files or a choice of them")
    asked = parser.parse_args()
    if asked.tests is not None and not asked.torch:
        parser.error("--tests needs --torch")
    tests = [] if asked.tests is None else asked.tests or TESTS

    release, files = version(), repository()
    sdist, wheel = build(asked.out)
    check_sdist(sdist, files)
    check_wheel(wheel, release, files)
    print(f"{sdist.name} and {wheel.name}: contents ok")
    pythons = asked.python or list(interpreters())
    with tempfile.TemporaryDirectory(prefix="packages-") as name:
        folder = Path(name).resolve()
        for i, python in enumerate(pythons):
            environment = Environment(python, folder / f"{i}")
            check_without_torch(environment, wheel)
            print(f"{environment.run('--version').strip()} without torch: ok")
        for triton in (True, False):
            check_borrowing(Environment(sys.executable, folder / f"borrow-{triton}"), wheel, triton)
            print(f"this environment, {'with' if triton else 'without'} Triton: ok")
        for i, python in enumerate(pythons if asked.torch else []):
            for torch in asked.torch:
                environment = Environment(python, folder / f"{i}-{torch}")
                check_with_torch(environment, wheel, sdist, torch, tests)
                print(f"{environment.run('--version').strip()} with torch {torch}: ok")
                shutil.rmtree(folder / f"{i}-{torch}")


if __name__ == "__main__":
    main()
