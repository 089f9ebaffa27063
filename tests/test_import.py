"""The import has no side effects, and ``python -m dydila_kernels`` reports."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import dydila_kernels

ROOT = Path(dydila_kernels.__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_import_needs_torch_einops_and_numpy_alone_and_changes_nothing() -> None:
    done = run(
        "-c",
        "import os, sys, warnings, torch, einops, numpy\n"
        "warnings.simplefilter('error')\n"
        "before, env, threads = set(sys.modules), dict(os.environ), torch.get_num_threads()\n"
        "state, dtype = torch.random.get_rng_state(), torch.get_default_dtype()\n"
        "import dydila_kernels\n"
        "import dydila_kernels.testing\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new - set(sys.stdlib_module_names) - {'dydila_kernels', 'torch', 'einops', 'numpy'}, new\n"
        "assert env == dict(os.environ)\n"
        "assert threads == torch.get_num_threads() and dtype == torch.get_default_dtype()\n"
        "assert torch.equal(state, torch.random.get_rng_state())\n"
        "assert not torch.cuda.is_initialized()\n",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_works_without_anything_optional() -> None:
    done = run(
        "-c",
        "import sys\n"
        "for name in ('triton', 'diffusers', 'timm', 'accelerate', 'matplotlib', 'hypothesis', 'pytest'):\n"
        "    sys.modules[name] = None\n"
        "import torch, dydila_kernels\n"
        "assert dydila_kernels.DyDiLAttention(8)(torch.randn(1, 4, 8)).shape == (1, 4, 8)\n",
    )
    assert done.returncode == 0, done.stderr


def test_public_names() -> None:
    assert set(dydila_kernels.__all__) >= {"DyDiLAttention", "Routing", "dydila_attention"}
    assert all(hasattr(dydila_kernels, name) for name in dydila_kernels.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", dydila_kernels.__version__)
    assert (Path(dydila_kernels.__file__).parent / "py.typed").exists()


def test_the_reference_imports_nothing_of_the_package() -> None:
    source = Path(dydila_kernels.reference.__file__).read_text()
    assert not re.search(r"^\s*(from|import) dydila_kernels", source, re.MULTILINE)
    assert "triton" not in source


def test_report() -> None:
    done = run("-m", "dydila_kernels")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (dydila_kernels.__version__, "torch", "device", "backend", "self-check", "ok"):
        assert word in done.stdout, word
