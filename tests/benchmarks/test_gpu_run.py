"""A GPU run: parts that fail or hang leave the others alone, and what was done is on disk."""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest
import tyro

from benchmarks import gpu_run, harness, store, sweep
from benchmarks.harness import Row
from benchmarks.offline.prediction.steps import SETTINGS
from tests.benchmarks.rows import row


def part(name: str, *scripts: str, needs: tuple[str, ...] = (), seconds: float = 10) -> gpu_run.Part:
    """A part that runs Python scripts, with the folder as their argument."""

    def commands(device: str, smoke: bool, out: object) -> list[list[str]]:
        return [[sys.executable, "-c", script, str(out)] for script in scripts]

    return gpu_run.Part(name, seconds, commands, needs)


def leaves(name: str, rows: list[Row]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return f"import sys, pathlib; pathlib.Path(sys.argv[1], '{name}.jsonl').write_text({text!r})"


def test_one_part_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    first = [row("dydila", 64, 1.0, suite="good"), row("dydila", 256, 2.0, suite="good")]
    chosen = [
        part("tests", "print('3 passed in 1s')", "raise SystemExit(1)"),
        part("good", leaves("good", first[:1]), leaves("good", first[1:])),
        part("killed", "import os; os.kill(os.getpid(), 9)"),
        part("absent", "print()", needs=("no_such_package",)),
    ]
    outcomes = gpu_run.main(gpu_run.Config(tmp_path, device="cpu"), chosen)
    states = [outcome.state for outcome in outcomes]
    assert states == [
        "failed with exit code 1",
        "passed",
        "killed by signal 9",
        "left out: No module named 'no_such_package'",
    ]
    assert [outcome.bad for outcome in outcomes] == [True, False, True, False]
    stored = harness.read_rows(tmp_path / "rows.jsonl")
    assert [r for r in stored if r["suite"] == "good"] == first
    assert [(r["part"], r["state"]) for r in stored if r["suite"] == "gpu_run"] == list(
        zip((p.name for p in chosen), states, strict=True)
    )
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "tests.txt", "log.txt", "good.png"}
    assert "3 passed" in (tmp_path / "tests.txt").read_text()


def test_what_hangs_is_stopped_with_all_that_it_started_and_keeps_its_rows(tmp_path: Path) -> None:
    child = f"import pathlib, time; time.sleep(4); pathlib.Path({str(tmp_path)!r}, 'alive').touch()"
    popen = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    hang = f"{leaves('hang', [row('dydila', 64, 1.0)])}; {popen}"
    began = time.monotonic()
    chosen = [part("hang", hang, "print()"), part("after", "print()", seconds=90)]
    (stopped, after) = gpu_run.main(gpu_run.Config(tmp_path, device="cpu", minutes=0.25), chosen)
    assert stopped.state == "out of time" and stopped.figure == "1 timed" and after.state == "passed"
    assert time.monotonic() - began < 15
    time.sleep(max(0, began + 7 - time.monotonic()))
    assert not (tmp_path / "alive").exists()


def test_long_output_loses_its_middle() -> None:
    assert gpu_run.shortened(b"a" * 100 + b"b" * 100, 20) == "a" * 10 + "\n[...]\n" + "b" * 10
    assert gpu_run.shortened(b"ab", 20) == "ab"


def test_the_parts_fit_into_the_time() -> None:
    """Nine minutes, of which a tenth is for what nobody thought of; and four with those of the second run."""
    assert [p.name for p in gpu_run.PARTS] == list(get_args(gpu_run.Name))
    asked = {p.name: p.seconds for p in gpu_run.PARTS if p.by_default}
    assert [*asked] == ["device", "kernels", "layer", "sweep"]
    assert sum(asked.values()) <= 60 * gpu_run.MINUTES == 540
    assert sum(p.seconds for p in gpu_run.PARTS if p.name in ("kernels", "training")) <= 240
    assert all(p.seconds < 480 for p in gpu_run.PARTS)


def test_models_need_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is then said at the start of a run, and not found in its middle."""
    monkeypatch.delitem(sys.modules, "examples.dydi_lit", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    needing = [part.name for part in gpu_run.PARTS if "pip install dydila-kernels[examples]" in (part.missing or "")]
    assert needing == ["model", "latency", "training"]


def test_a_gpu_gets_sizes_and_a_cpu_the_defaults() -> None:
    core = next(p for p in gpu_run.PARTS if p.name == "core")
    on_gpu, on_cpu = core.commands("cuda", False, "out"), core.commands("cpu", False, "out")
    assert all("--sizes" in command for command in on_gpu)
    assert [command[3:] for command in on_cpu] == [["--device", "cpu", "--out", "out"]]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("part", [p for p in gpu_run.PARTS if p.name not in ("device", "tests")], ids=lambda p: p.name)
def test_the_options_of_the_parts_are_those_of_the_suites(part: gpu_run.Part, device: str, smoke: bool) -> None:
    if part.missing:
        pytest.skip(f"needs {part.missing}")
    for command in part.commands(device, smoke, "out"):
        module, *options = command[command.index("-m") + 1 :]
        config = tyro.cli(import_module(module).Config, args=options)
        assert config.device == device and config.smoke == smoke


@pytest.mark.parametrize("name", ["device", "tests"])
def test_what_fills_the_memory_runs_alone(name: str) -> None:
    part = next(p for p in gpu_run.PARTS if p.name == name)
    commands = part.commands("cuda", False, "out")
    pytest.importorskip("xdist")
    assert len(commands) == 3 and "alone" not in {word for command in commands for word in command}
    assert ["-n" in command for command in commands] == [name != "device", name == "device", True]
    words = [word.removeprefix("--ignore=") for command in commands for word in command]
    assert all((harness.REPOSITORY / word).exists() for word in words if word.startswith("tests"))


def test_those_that_missed_their_prediction_most_are_swept(tmp_path: Path) -> None:
    def swept() -> list[list[str]]:
        return [command[3:] for command in gpu_run.sweeps("cuda", False, tmp_path)]

    assert swept() == [["--device", "cuda", "--out", str(tmp_path)]]
    rows = [
        {"suite": "kernels", "name": f"{name}_kernel", "mode": mode, "median_ms": ms, "predicted_us": 50.0,
         "verdict": verdict, **setting._asdict()}
        for name, mode, ms, verdict, setting in (
            ("state", "forward", 0.1, "slower", SETTINGS[0]),
            ("product", "forward", 0.2, "at most 1.4 above", SETTINGS[0]),
            ("depthwise", "forward", 0.3, "slower", SETTINGS[1]),
            ("gluon_tokens", "forward", 0.08, "slower", SETTINGS[0]),
            ("gluon_tokens", "forward", 0.08, "slower", SETTINGS[0]),
            ("gluon_dots", "backward", 0.6, "slower", SETTINGS[0]),
            ("prepare", "forward", 0.051, "slower", SETTINGS[0]),
        )
    ]  # fmt: skip
    harness.write_rows(tmp_path / "rows.jsonl", [*rows, {"suite": "gpu_run", "part": "kernels"}])
    stages = [command[command.index("--stages") + 1 :][:3] for command in swept()]
    assert stages == [
        ["gluon_dots", "--modes", "forward+backward"], ["state", "--modes", "forward"],
        ["gluon_tokens", "--modes", "forward"],
    ]  # fmt: skip
    for command in swept():
        assert tyro.cli(sweep.Config, args=command).shapes == ((8, 4096, 768, 12),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 failed, 29 passed, 2 skipped in 45.5s\n4 passed in 1.0s (0:01:02)", "1 failed, 33 passed, 2 skipped"),
        ("2 errors in 3.2s\n===== 1 error, 1 passed in 2.0s =====", "3 error, 1 passed"),
        ("nothing", ""),
    ],
)
def test_counts_of_pytest(text: str, words: str) -> None:
    assert gpu_run.figure(text, []) == words


def test_key_figures() -> None:
    rows = [row("dydila", 1024, 2.0), row("softmax", 1024, 6.0), row("dydila", 4096, 2.0), row("softmax", 4096, None)]
    assert gpu_run.figure("", rows) == "3 timed, 1 out of memory, 1 goals met"
    rows[1]["median_ms"] = 1.0
    assert gpu_run.figure("", rows) == "3 timed, 1 out of memory, 1 goals missed"
    tried = [{"suite": "sweep", "stage": "state", "mode": "forward", "median_ms": ms} for ms in (1.5, None)]
    assert gpu_run.figure("2 in 1s", tried) == "2 timed"
    kernels = [{"suite": "kernels", "verdict": verdict} for verdict in ("slower", "faster", "slower", None)]
    assert gpu_run.figure("", [*kernels, {"failure": "RuntimeError: no"}]) == "2 slower, 1 faster, 1 timed, 1 failed"


def test_rows_go_where_they_are_committed(tmp_path: Path) -> None:
    rows = [row("dydila", 64, 1.0, device="NVIDIA H200", device_type="cuda"), {"suite": "gpu_run", "part": "layer"}]
    harness.write_rows(tmp_path / "rows.jsonl", rows)
    folder = store.main(tmp_path, tmp_path / "results")
    assert folder == tmp_path / "results" / "nvidia-h200"
    assert harness.read_rows(folder / "layer.jsonl") == rows[:1] and (folder / "layer.png").exists()
    harness.write_rows(tmp_path / "rows.jsonl", rows[1:])
    with pytest.raises(ValueError, match="one device"):
        store.main(tmp_path, tmp_path / "results")
