"""The PTX emulator: its numbers, its checks on hand-written PTX, and its self-test and the kernels on each target."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import interpreter
from tests.emulation import TARGETS
from tools.ptx import approximate, numbers
from tools.ptx.arrays import Unsupported
from tools.ptx.findings import Report
from tools.ptx.machine import EndlessLoop, launch
from tools.ptx.memory import Interval, Memory
from tools.ptx.parsing import Kernel

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
WORDS = RNG.integers(0, 2**32, 4096, dtype=np.uint32)

HEAD = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 .ptr .global kernel_param_0)
.reqntid 64
{
    .reg .pred %p<3>; .reg .b32 %r<9>; .reg .f32 %f<5>; .reg .b64 %rd<9>;
    ld.param.u64 %rd1, [kernel_param_0];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
"""


def run(body: str, words: int = 64, shared: int = 256) -> tuple[np.ndarray, Report]:
    """The words that 64 threads leave; %r1 is the thread, %rd3 the address of its word."""
    out = np.zeros(words, np.uint32)
    start = out.ctypes.data
    report = Report()
    memory = Memory([Interval(start, start + out.nbytes, 4, "out")])
    launch(Kernel(f"{HEAD}{body}\n ret; \n}}\n", shared), (1,), [start], memory, report)
    return out, report


def test_halves_round_as_torch_rounds_them() -> None:
    x = WORDS.view(np.float32)
    x = np.where(np.isnan(x), np.float32(1), x)
    with np.errstate(over="ignore"):
        for narrow, widen, dtype in (
            (numbers.to_bf16, numbers.from_bf16, torch.bfloat16),
            (numbers.to_f16, numbers.from_f16, torch.float16),
        ):
            assert np.array_equal(widen(narrow(x)), torch.from_numpy(x).to(dtype).float().numpy())


def test_integers_against_python() -> None:
    a, b, c = WORDS[:100], WORDS[100:200], WORDS[200:300]
    for x, y, z, found in zip(a.tolist(), b.tolist(), c.tolist(), numbers.lop3(a, b, c, 0xE8).tolist(), strict=True):
        assert found == (x & y | x & z | y & z)
    shift = c & np.uint32(31)
    left = numbers.funnel_shift(a, b, shift, left=True, wrap=True)
    assert [
        (y << 32 | x) << s >> 32 & 0xFFFFFFFF for x, y, s in zip(a.tolist(), b.tolist(), shift.tolist(), strict=True)
    ] == left.tolist()
    signed = a.view(np.int32)
    fields = numbers.bfe(signed, np.full(100, 4, np.uint32), np.full(100, 8, np.uint32))
    assert fields.tolist() == [((x >> 4) + 128) % 256 - 128 for x in signed.tolist()]
    assert numbers.brev(a).tolist() == [int(f"{x:032b}"[::-1], 2) for x in a.tolist()]
    divisors = np.where(b.view(np.int32) == 0, 1, b.view(np.int32) >> 16)
    divisors = np.where(divisors == 0, 7, divisors).astype(np.int32)
    assert numbers.div_int(signed, divisors).tolist() == [
        int(x / y) for x, y in zip(signed.tolist(), divisors.tolist(), strict=True)
    ]


def test_instruction_errors_stay_within_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    x = RNG.uniform(-20, 20, 4096).astype(np.float32)
    exact = np.exp2(x.astype(np.float64))
    for share in (0.0, 0.25, 1.0):
        monkeypatch.setattr(approximate, "SHARE", share)
        off = np.abs(approximate.ex2(x) / exact - 1).max()
        assert share * approximate.EX2 / 2 <= off <= share * approximate.EX2 + 2.0**-24
        assert approximate.ex2(np.float32([3.0])) == 8.0


def test_threads_diverge_and_meet() -> None:
    out, report = run("""
    mov.b32 %r2, 5;
    setp.lt.u32 %p1, %r1, 10;
    @%p1 bra $L_less;
    add.s32 %r2, %r2, %r1;
    bra.uni $L_end;
$L_less:
    mov.b32 %r2, 1;
$L_end:
    st.global.b32 [%rd3], %r2;""")
    assert out.tolist() == [1] * 10 + [5 + n for n in range(10, 64)] and not report.kinds()


SHARED = """
    shl.b32 %r2, %r1, 2;
    st.shared.b32 [%r2], %r1;
    {barrier}
    sub.s32 %r3, 252, %r2;
    ld.shared.b32 %r4, [%r3];
    st.global.b32 [%rd3], %r4;"""


def test_a_barrier_is_missed() -> None:
    out, report = run(SHARED.format(barrier="bar.sync 0;"))
    assert out.tolist() == list(range(63, -1, -1)) and not report.kinds()
    _, report = run(SHARED.format(barrier=""))
    assert report.kinds() == ["race shared: read after write"]
    _, report = run(SHARED.format(barrier="bar.warp.sync -1;"))  # not enough for two warps
    assert report.kinds() == ["race shared: read after write"]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("st.global.b32 [%rd3 + 4], %r1;", "out of bounds write"),
        ("ld.global.b32 %r2, [%rd3 + 2];", "misaligned global"),
        ("st.global.b32 [%rd1], %r1;", "race global: two threads write different values at once"),
        ("ld.shared.b32 %r2, [0];", "uninitialised shared"),
        ("st.shared.b32 [256], %r1;", "out of bounds shared write"),
        ("setp.lt.u32 %p1, %r1, 10; @%p1 ret; shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;",
         "warp instruction without all lanes"),
    ],
)  # fmt: skip
def test_faults_are_found(body: str, kind: str) -> None:
    report = run(body)[1]
    assert kind in report.kinds()
    last = body.rstrip(";").split("; ")[-1]
    assert any(last in fault for fault in report.faults())


def test_what_is_unknown_is_named() -> None:
    with pytest.raises(Unsupported, match=r"PTX line \d+: tanh.approx.f32"):
        run("tanh.approx.f32 %f1, %f2;")
    lonely = """
    setp.lt.u32 %p1, %r1, 10;
    @%p1 bra $L_end;
    bar.sync 0;
$L_end:
    shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;"""
    with pytest.raises(EndlessLoop, match="no group of threads can go on"):
        run(lonely)


def in_a_process(*command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


needs_triton = pytest.mark.skipif(not interpreter.AVAILABLE, reason="Triton is not installed")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_self_test(target: str) -> None:
    assert ", 0 wrong" in in_a_process("-m", "tools.ptx.selftest", target)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_selected_forms_of_the_kernels(target: str) -> None:
    """The others: ``make emulate``."""
    said = in_a_process(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--emulate", target, "-m", "emulated",
        "tests/ops/test_configurations.py",
    )  # fmt: skip
    assert "4 passed" in said
    for kernel in ("gluon_tokens_kernel", "gluon_gradients_kernel", "readout_kernel", "rotate_kernel"):
        assert f" {kernel}: " in said
