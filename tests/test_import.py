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


def test_import_needs_torch_and_einops_alone_and_changes_nothing() -> None:
    done = run(
        "-c",
        "import os, sys, warnings, torch, einops\n"
        "warnings.simplefilter('error')\n"
        "before, env, threads = set(sys.modules), dict(os.environ), torch.get_num_threads()\n"
        "state, dtype = torch.random.get_rng_state(), torch.get_default_dtype()\n"
        "import dydila_kernels\n"
        "import dydila_kernels.testing\n"
        "new = {name for name in set(sys.modules) - before if name.split('.')[0] != 'dydila_kernels'}\n"
        "assert all(name.split('.')[0] in {*sys.stdlib_module_names, 'einops'} for name in new), new\n"
        "assert not any(name.startswith(('dydila_kernels.ops', 'dydila_kernels.dist')) for name in sys.modules)\n"
        "assert env == dict(os.environ)\n"
        "assert threads == torch.get_num_threads() and dtype == torch.get_default_dtype()\n"
        "assert torch.equal(state, torch.random.get_rng_state())\n"
        "assert not torch.cuda.is_initialized()\n",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_takes_less_than_a_fifth_of_a_second() -> None:
    """Beyond torch's.  Time of the processor, and the best of several processes: others on the machine do not count."""
    script = (
        "import time, torch; start = time.process_time(); import dydila_kernels; print(time.process_time() - start)"
    )
    times = []
    while len(times) < 5 and min(times, default=1) > 0.2:
        times.append(float(run("-c", script).stdout))
    assert min(times) < 0.2, times


def test_import_works_without_anything_optional() -> None:
    done = run(
        "-c",
        "import sys\n"
        "for name in ('numpy', 'triton', 'diffusers', 'timm', 'accelerate', 'matplotlib', 'hypothesis', 'pytest'):\n"
        "    sys.modules[name] = None\n"
        "import torch, dydila_kernels\n"
        "assert dydila_kernels.DyDiLAttention(8)(torch.randn(1, 4, 8)).shape == (1, 4, 8)\n",
    )
    assert done.returncode == 0, done.stderr


def test_public_names() -> None:
    assert set(dydila_kernels.__all__) >= {"DyDiLAttention", "Routing", "dydila_attention", "replace_attention"}
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
