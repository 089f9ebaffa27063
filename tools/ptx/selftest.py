"""The emulator against torch, on small kernels of which some are wrong on purpose: ``python -m tools.ptx.selftest``.

Exits with 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch

from tools.ptx import approximate, selftest_kernels
from tools.ptx.findings import Report
from tools.ptx.launching import TARGETS, Emulation
from tools.ptx.machine import EndlessLoop
from tools.ptx.parsing import Kernel

HALVES = (torch.bfloat16, torch.float16)


class Result(NamedTuple):
    """Of one check; ``detail`` says why it is not right."""

    name: str
    right: bool
    detail: object = ""


def run(target: str, name: str, grid: tuple[int, ...], warps: int = 4, stages: int = 1, **arguments: Any) -> Emulation:
    emulation = Emulation(target)
    emulation(getattr(selftest_kernels, name), grid, arguments, {"num_warps": warps, "num_stages": stages})
    return emulation


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, of the whole."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def faults(target: str) -> Iterator[Result]:
    """What is wrong is found, and what is right is not."""
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        x, y = (torch.randn(1000) * 50).to(dtype), torch.zeros(1000, dtype=dtype)
        found = run(target, "copy", (8,), X=x, Y=y, N=1000, EXTRA=0, B=128).report
        yield Result(f"copy of {dtype}", torch.equal(x, y) and not found.kinds(), found.faults())
    x, y = torch.randn(1001)[1:], torch.zeros(1000)
    found = run(target, "copy", (8,), X=x, Y=y, N=1000, EXTRA=0, B=128).report
    yield Result("copy of a view that begins at 4 bytes", torch.equal(x, y) and not found.kinds(), found.faults())
    found = run(target, "copy", (8,), X=torch.randn(1000), Y=y, N=1000, EXTRA=1, B=128).report
    yield Result("a read past the end", found.kinds() == ["out of bounds read"], found.faults())
    found = run(target, "everyone_writes", (3,), X=torch.randn(128), Y=y, B=128).report
    yield Result("programs that write to one place", any("programs" in kind for kind in found.kinds()), found.faults())
    for barrier in (False, True):
        x = torch.randn(256)
        y = x.clone()
        found = run(target, "mirror_in_place", (1,), X=y, B=256, BARRIER=barrier).report
        right = (
            torch.equal(y, (x + 1).flip(0)) and not found.kinds() if barrier else "race global" in str(found.kinds())
        )
        yield Result(f"a race of threads, with a barrier: {barrier}", right, found.faults())


def numbers(target: str) -> Iterator[Result]:
    for dtype in (torch.float32, *HALVES):
        x = torch.randn(9, 77).to(dtype)
        y = torch.zeros_like(x)
        found = run(target, "softmax", (9,), X=x, Y=y, N=77, B=128).report
        off = error(y, torch.softmax(x.double(), 1))
        yield Result(f"softmax of {dtype}", off < (1e-6 if dtype == torch.float32 else 5e-3) and not found.kinds(), off)
    x, k = torch.randn(256), torch.randint(0, 1000, (256,), dtype=torch.int32)
    y, out = torch.zeros(256), torch.zeros(256 + 16, dtype=torch.int32)
    found = run(target, "arithmetic", (1,), X=x, INTEGERS=k, Y=y, OUT=out, N=9, B=256).report
    d = x.double()
    expected = torch.where(x > 0, d.abs().log2(), d.exp2()) + d.abs().sqrt() / (1 + d * d)
    expected = torch.where(k % 3 == 1, -expected, expected) + (k // 7) + d.cumsum(0)
    total = sum(torch.fmod(k * 5 - n, n + 2) for n in range(9)) + k.to(torch.int8).int()
    same = torch.equal(out, torch.cat([total.int(), x.view(16, 16).argmax(1).int()]))
    yield Result("arithmetic, scan, argmax", error(y, expected) < 1e-6 and same and not found.kinds(), found.faults())
    lengths, y = torch.tensor([3, 0, 7, 1, 5], dtype=torch.int32), torch.zeros(5, 256)
    found = run(target, "uneven_loop", (5,), LENGTHS=lengths, Y=y, B=256).report
    expected = torch.arange(256).double()[None] + torch.arange(5)[:, None]
    for p, length in enumerate(lengths.tolist()):
        for n in range(length):
            expected[p] = expected[p] + expected[p].sum() * 0.001 + n
    yield Result("programs that loop unevenly", error(y, expected) < 1e-6 and not found.kinds(), found.faults())


def products(target: str) -> Iterator[Result]:
    """On tensor cores, with and without pipelining, operands from registers and from shared memory."""
    precisions = ((torch.bfloat16, "ieee", 1e-6), (torch.float16, "ieee", 1e-6), (torch.float32, "ieee", 3e-7),
                  (torch.float32, "tf32", 1e-3), (torch.float32, "tf32x3", 2e-6))  # fmt: skip
    tiles = ((32, 32, 32, 4, 1), (32, 32, 32, 4, 3), (64, 16, 32, 4, 2), (64, 64, 64, 4, 2), (128, 32, 64, 8, 2))
    for (dtype, precision, bound), (bm, bn, bk, warps, stages) in product(precisions, tiles):
        m, n, k = 150, 140, 96
        a, b, c = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.zeros(m, n)
        blocks: dict[str, Any] = {"BM": bm, "BN": bn, "BK": bk, "PRECISION": precision}
        made = run(target, "matmul", (-(-m // bm), -(-n // bn)), warps, stages, A=a, B=b, C=c, M=m, N=n, K=k, **blocks)
        off = error(c, a.double() @ b.double())
        name = f"product of {dtype} {precision}, tiles {bm} {bn} {bk}, {warps} warps, {stages} stages"
        yield Result(name, off < bound and not made.report.kinds(), (off, made.report.faults()))
        if precision != "tf32x3" and stages != 3:
            a, b, c = torch.randn(bk, bm).to(dtype), torch.randn(bn, bk).to(dtype), torch.zeros(bm, bn)
            made = run(target, "matmul_transposed", (1,), warps, A=a, B=b, C=c, **blocks)
            off = error(c, a.double().T @ b.double().T)
            yield Result(f"transposed {name}", off < bound and not made.report.kinds(), (off, made.report.faults()))
    if target == "sm_90":
        yield Result("warpgroups multiply", any("wgmma.mma" in kernel.text for kernel in made.compiled.values()))


WAITS = r"^\s*(bar\.sync\s+0|cp\.async\.wait_group\s+\d+|bar\.warp\.sync\s+-1|wgmma\.wait_group\.\S+\s+\d+)\s*;"


def removed(target: str) -> Iterator[Result]:
    """Each barrier and each wait of a product and of a softmax is taken away in turn: all but a few must be missed."""
    dtype, size = torch.bfloat16, 64
    a, b, c = torch.randn(size, 96).to(dtype), torch.randn(96, size).to(dtype), torch.zeros(size, size)
    x, y = torch.randn(4, 512), torch.zeros(4, 512)
    calls: tuple[tuple[str, int, dict[str, Any]], ...] = (
        ("matmul", 3, {"A": a, "B": b, "C": c, "M": size, "N": size, "K": 96, "PRECISION": "ieee", "BM": 64, "BN": 64,
                       "BK": 32}),
        ("softmax", 1, {"X": x, "Y": y, "N": 512, "B": 512}),
    )  # fmt: skip
    emulation, missed, total = Emulation(target), [], 0
    for name, stages, arguments in calls:
        options = {"num_warps": 4, "num_stages": stages}
        kernel, taken = emulation.specialise(getattr(selftest_kernels, name), arguments, options)
        for wait in re.finditer(WAITS, kernel.text, re.MULTILINE):
            text = f"{kernel.text[: wait.start(1)]}//{kernel.text[wait.start(1) :]}"
            report = Report()
            try:
                emulation.execute(Kernel(text, kernel.shared), (1,), taken, report)
            except EndlessLoop:
                continue
            finally:
                total += 1
            if not report.kinds():
                missed.append(wait[1])
    yield Result(f"{total} waits removed in turn", total > 5 and len(missed) <= total // 4, f"not seen: {missed}")


def instruction_errors(target: str) -> Iterator[Result]:
    """Approximate instructions are wrong, but not by more than documented; and exact where that is asked for."""
    x = torch.rand(4096).numpy() * 8 + 2.5
    exact = {"ex2": 2.0 ** x.astype("f8"), "rcp": 1 / x.astype("f8"), "rsqrt": x.astype("f8") ** -0.5}
    for share in (1.0, 0.0):
        approximate.SHARE = share
        for name, expected in exact.items():
            off = abs(getattr(approximate, name)(x) / expected - 1).max()
            bound = getattr(approximate, name.upper()) * share + 2.0**-24
            yield Result(f"{name} with a share of {share}", bound / 3 < off <= bound, (off, bound))
    approximate.SHARE = 1.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--verbose", action="store_true", help="say what is right, too")
    options = parser.parse_args()
    torch.manual_seed(0)
    results = []
    for part in (faults, numbers, products, removed, instruction_errors):
        for result in part(options.target):
            results.append(result)
            if not result.right or options.verbose:
                print("right" if result.right else "WRONG", result.name, result.detail, flush=True)
    wrong = sum(not result.right for result in results)
    print(f"{options.target}: {len(results)} checks, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
