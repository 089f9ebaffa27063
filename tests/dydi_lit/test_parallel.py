"""Two processes compute what one does, sharded or not, and continue each other's checkpoints."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

pytest.importorskip("examples.dydi_lit")

from examples.dydi_lit import configs
from examples.dydi_lit.checkpoint import load_ema_model, read_losses, read_state, read_training
from examples.dydi_lit.settings import to_json
from examples.dydi_lit.train import TrainConfig, train

ROOT = Path(__file__).parents[2]
SMALL = {"dim": 32, "depth": 2, "ffn_ratio": 1.0}
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
WORKER = """
import json, sys
from dataclasses import replace
from pathlib import Path
from examples.dydi_lit import configs, settings, train
configs._SIZES["tiny"], configs._DIT_DEPTH["tiny"] = json.loads(sys.argv[1]), 2
for values in json.loads(sys.argv[2]):
    resume = values.pop("resume", None)
    run = replace(settings.from_json(values), resume=Path(resume) if resume else None)
    train.train(run)
"""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TrainConfig:
    """Four steps of eight digits with a network of two narrow blocks."""
    monkeypatch.setitem(configs._SIZES, "tiny", SMALL)
    monkeypatch.setitem(configs._DIT_DEPTH, "tiny", 2)
    return TrainConfig(output=tmp_path / "one", steps=4, batch_size=8, warmup_steps=2, save_every=4, log_every=2)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def on_two_processes(runs: list[TrainConfig], folder: Path) -> None:
    """Trains all of `runs` one after the other on a pair of processes with gloo."""
    script = folder / "worker.py"
    script.write_text(WORKER)
    values = [to_json(run) | ({"resume": str(run.resume)} if run.resume else {}) for run in runs]
    command = [*LAUNCH, str(script), json.dumps(SMALL), json.dumps(values)]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-5000:]


def assert_close(found: Path, expected: Path) -> None:
    """Losses to the rounding of float32, averaged weights likewise."""
    losses, reference = (torch.tensor(read_losses(folder)) for folder in (found, expected))
    torch.testing.assert_close(losses, reference, rtol=1e-5, atol=0)
    ours, theirs = (load_ema_model(folder, fuse=False).state_dict() for folder in (found, expected))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_two_processes_compute_what_one_does(small: TrainConfig, tmp_path: Path) -> None:
    """Every model, whole and sharded; a parameter without a gradient would end DDP with an error."""
    models = get_args(configs.Model)
    pairs = [
        replace(small, model=model, parallel=parallel, output=tmp_path / f"{model}-{parallel}")
        for model in models
        for parallel in ("ddp", "fsdp2")
    ]
    variants = [
        replace(small, accumulate=2, output=tmp_path / "accumulated-ddp"),
        replace(small, accumulate=2, parallel="fsdp2", output=tmp_path / "accumulated-fsdp2"),
        replace(small, gradient_checkpointing=True, parallel="fsdp2", output=tmp_path / "checkpointed-fsdp2"),
    ]
    on_two_processes([*pairs, *variants], tmp_path)
    expected = {model: train(replace(small, model=model, output=tmp_path / model)) for model in models}
    for run in [*pairs, *variants]:
        assert_close(run.output / "checkpoint", expected[run.model])
        assert not list(run.output.glob("checkpoint.*"))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_resuming_on_two_processes_and_across(small: TrainConfig, tmp_path: Path, parallel: str) -> None:
    """To the bit on as many processes; to rounding where their number changes."""
    small = replace(small, save_every=2, archive_every=2, weight_decay=0.1)
    one = train(small)
    half = "checkpoint-0000002"
    straight = replace(small, parallel=parallel, output=tmp_path / "straight")
    again = replace(straight, output=tmp_path / "again", resume=straight.output / half)
    taken_over = replace(straight, output=tmp_path / "taken over", resume=small.output / half)
    on_two_processes([straight, again, taken_over], tmp_path)
    given_back = train(replace(small, output=tmp_path / "given back", resume=straight.output / half))

    assert read_losses(again.output / "checkpoint") == read_losses(straight.output / "checkpoint")
    ours, theirs = (read_state(run.output / "checkpoint") for run in (again, straight))
    for found, expected in ((ours.weights, theirs.weights), (ours.moments, theirs.moments)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert ours.counters == theirs.counters
    for checkpoint in (straight.output / "checkpoint", taken_over.output / "checkpoint", given_back):
        assert_close(checkpoint, one)


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_once(tmp_path: Path) -> None:
    options = ["--output", str(tmp_path), "--save-every", "1", "--log-every", "1", "--batch-size", "8"]
    command = [*LAUNCH, "-m", "examples.dydi_lit.train", *options]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not (tmp_path / "checkpoint").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=100)
    checkpoint = tmp_path / "checkpoint"
    assert printed.count(f"resume with: python -m examples.dydi_lit.train --resume {checkpoint}") == 1
    assert len(read_losses(checkpoint)) == read_training(checkpoint)["steps_done"] < 1500
