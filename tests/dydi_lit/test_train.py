"""Training on one process: resuming to the bit, checkpoints, logs, and what is refused."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch

pytest.importorskip("examples.dydi_lit")

from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.dydi_lit import configs, train
from examples.dydi_lit.batches import StepSampler
from examples.dydi_lit.checkpoint import (
    CheckpointError,
    load_ema_model,
    read_losses,
    read_state,
    read_training,
)
from examples.dydi_lit.diffusion import Losses
from examples.dydi_lit.recorder import Diverged, Recorder
from examples.dydi_lit.settings import from_json
from examples.dydi_lit.train import Interrupted, TrainConfig
from tests.dydi_lit.training import FewDigits, interrupt_at, on_call

ROOT = Path(__file__).parents[2]
CURVES = {"loss", "mse", "variational", "gradient_norm", "learning_rate", "images_per_second"}


def assert_same(found: Path, expected: Path) -> None:
    """Everything in the two checkpoints is equal to the bit."""
    assert read_losses(found) == read_losses(expected)
    ours, theirs = read_state(found), read_state(expected)
    averages = [load_ema_model(folder, fuse=False).state_dict() for folder in (found, expected)]
    for one, other in ((ours.weights, theirs.weights), (ours.moments, theirs.moments), averages):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert ours.counters == theirs.counters


# --- resuming


@pytest.mark.parametrize("accumulate, workers", [(1, 0), (2, 0), (1, 2)])
def test_resumed_run_equals_an_uninterrupted_one(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, accumulate: int, workers: int
) -> None:
    """Stopped in the middle of an epoch, and of an accumulated step; ended in the second epoch."""
    small = replace(small, accumulate=accumulate, num_workers=workers)
    straight = train.train(small)

    handler = signal.getsignal(signal.SIGINT)
    halved = replace(small, output=tmp_path / "halved")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3 * accumulate - accumulate // 2)
        with pytest.raises(Interrupted) as stopped:
            train.train(halved)
    checkpoint = stopped.value.checkpoint
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(read_losses(checkpoint)) == read_training(checkpoint)["steps_done"] == 3
    torch.rand(5)  # the resumed process is in another random state

    assert_same(train.train(replace(halved, resume=checkpoint)), straight)


def test_same_seed_same_run(small: TrainConfig, tmp_path: Path) -> None:
    one, two = (train.train(replace(small, output=tmp_path / name)) for name in ("one", "two"))
    other = train.train(replace(small, output=tmp_path / "other", seed=1))
    assert_same(one, two)
    assert read_losses(one) != read_losses(other)


def test_a_resumed_run_may_be_longer(small: TrainConfig) -> None:
    small = replace(small, schedule="constant_with_warmup")  # its rates do not depend on the number of steps
    straight = read_losses(train.train(small))
    short = train.train(replace(small, steps=4))
    assert read_losses(train.train(replace(small, resume=short))) == straight


@pytest.mark.slow
def test_killed_run_resumes_to_the_bit(tmp_path: Path) -> None:
    """SIGKILL at any moment, between checkpoints or while one is written; with real processes and real defaults."""
    common = ["--steps", "12", "--batch-size", "8", "--save-every", "2", "--log-every", "1"]
    command = [sys.executable, "-m", "examples.dydi_lit.train", *common, "--output"]
    subprocess.run([*command, str(tmp_path / "straight")], cwd=ROOT, check=True, timeout=200)

    killed = tmp_path / "killed"
    process = subprocess.Popen([*command, str(killed)], cwd=ROOT)
    while not (killed / "checkpoint").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    process.kill()
    assert process.wait(timeout=30) == -signal.SIGKILL
    assert read_training(killed / "checkpoint")["steps_done"] < 12
    resume = [sys.executable, "-m", "examples.dydi_lit.train", "--resume", str(killed / "checkpoint")]
    subprocess.run(resume, cwd=ROOT, check=True, timeout=200)
    assert_same(killed / "checkpoint", tmp_path / "straight" / "checkpoint")
    assert sorted(path.name for path in killed.iterdir()) == ["checkpoint", "loss.png", "tensorboard"]


@pytest.mark.slow
def test_ctrl_c_on_a_real_process(tmp_path: Path) -> None:
    """With workers, which get the Ctrl-C of a terminal as well."""
    options = ["--output", str(tmp_path), "--save-every", "1", "--log-every", "1", "--num-workers", "1"]
    command = [sys.executable, "-m", "examples.dydi_lit.train", *options]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 100
    while not (tmp_path / "checkpoint").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert f"resume with: python -m examples.dydi_lit.train --resume {tmp_path / 'checkpoint'}" in printed
    assert process.returncode == 1 and "Traceback" not in printed


def test_a_run_that_is_left_early_leaves_no_workers(small: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """They heed no signal, so that Python would wait for them forever at its end."""
    interrupt_at(monkeypatch, 2)
    with pytest.raises(train.Interrupted) as stopped:  # keeps the frames of the traceback alive
        train.train(replace(small, num_workers=2))
    assert stopped.value.__traceback__ is not None
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": "sana"}, "was trained with model = dydi-lit, not sana: leave --model out to resume it"),
        ({"size": "S"}, "size = tiny, not S"),
        ({"batch_size": 4}, "batch_size = 8, not 4: leave --batch-size out"),
        ({"seed": 3}, "seed = 0, not 3"),
        ({"learning_rate": 1e-4}, "learning_rate = 0.003, not 0.0001"),
        ({"steps": 3}, "is at step 7, beyond steps = 3"),
    ],
)
def test_resuming_as_another_run_is_refused(small: TrainConfig, change: dict[str, Any], message: str) -> None:
    checkpoint = train.train(small)
    before = (checkpoint / "training.json").read_bytes()
    with pytest.raises(CheckpointError, match=message):
        train.train(replace(small, resume=checkpoint, **change))
    assert (checkpoint / "training.json").read_bytes() == before


def test_resuming_on_other_data_is_refused(small: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = train.train(replace(small, steps=1))
    data = FewDigits()
    data.class_names = [*"abcdefghij"]
    monkeypatch.setattr(train, "open_data", lambda *arguments: data)
    with pytest.raises(CheckpointError, match="was trained on other data"):
        train.train(replace(small, resume=checkpoint))


# --- what a step computes


def test_accumulating_changes_nothing_but_rounding(small: TrainConfig, tmp_path: Path) -> None:
    whole = train.train(small)
    parts = train.train(replace(small, accumulate=4, output=tmp_path / "parts"))
    np.testing.assert_allclose(read_losses(parts), read_losses(whole), rtol=1e-5)


@pytest.mark.parametrize("model", get_args(configs.Model))
def test_every_model_learns(small: TrainConfig, monkeypatch: pytest.MonkeyPatch, model: configs.Model) -> None:
    """All that is trained gets a gradient, and on the same images, noise and time steps the loss falls."""
    monkeypatch.setattr(train.Run, "save", lambda run: runs.append(run))
    first = lambda length, share, *_: list(StepSampler(length, share, 0, 0, 1)) * 15  # noqa: E731
    monkeypatch.setattr(train, "StepSampler", first)
    runs: list[train.Run] = []
    train.train(replace(small, model=model, steps=15, warmup_steps=1, batch_size=40, gradient_clip=None))
    losses = runs[-1].losses
    assert losses[-1] < 0.9 * losses[0]
    optimizer = runs[-1].optimizer.optimizer
    assert all(parameter in optimizer.state for parameter in runs[-1].parameters)
    before = configs.config_of(model, "tiny", in_channels=1, num_classes=10)
    fixed = {name for name, weight in runs[-1].network.named_parameters() if not weight.requires_grad}
    assert all("router" in name or ("gamma" in name and not before.learned_gamma) for name in fixed)


def test_without_learned_variance_the_loss_is_the_squared_error(small: TrainConfig) -> None:
    checkpoint = train.train(replace(small, learn_sigma=False, steps=2))
    curves = read_curves(small.output)
    assert curves["loss"] == curves["mse"] and not any(value for _, value in curves["variational"])
    assert load_ema_model(checkpoint).out_channels == 1


def test_gradients_are_clipped(small: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm that is logged is the one before; AdamW's first moment shows the one after."""
    first = replace(small, steps=1, warmup_steps=0, gradient_clip=1e-3)
    state = read_state(train.train(first))
    norm = sum(float(value.square().sum()) for name, value in state.moments.items() if name.endswith("exp_avg")) ** 0.5
    assert norm == pytest.approx(0.1 * 1e-3, rel=1e-3)
    assert read_curves(first.output)["gradient_norm"][0][1] > 0.01


def test_average_follows_the_weights(small: TrainConfig) -> None:
    """Decay 0 is the last weights, decay 1 those after the first step, which the average starts from."""
    last = train.train(replace(small, ema_decay=0.0))
    averaged, weights = load_ema_model(last, fuse=False).state_dict(), read_state(last).weights
    assert all(torch.equal(averaged[name], weights[name]) for name in weights)
    first = read_state(train.train(replace(small, steps=1, schedule="constant"))).weights
    averaged = load_ema_model(train.train(replace(small, ema_decay=1.0, schedule="constant")), fuse=False).state_dict()
    assert all(torch.equal(averaged[name], first[name]) for name in first)


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"num_workers": 1}])
def test_options_that_leave_the_losses_as_they_are(small: TrainConfig, tmp_path: Path, options: dict[str, Any]) -> None:
    assert_same(train.train(replace(small, output=tmp_path / "other", **options)), train.train(small))


def test_bf16_is_close(small: TrainConfig, tmp_path: Path, other_precision: None) -> None:
    half = train.train(replace(small, mixed_precision="bf16"))
    assert {weight.dtype for weight in read_state(half).weights.values()} == {torch.float32}
    AcceleratorState._reset_state(reset_partial_state=True)
    full = train.train(replace(small, output=tmp_path / "full"))
    np.testing.assert_allclose(read_losses(half), read_losses(full), rtol=0.05)
    assert read_losses(half) != read_losses(full)


# --- what a run leaves behind


def read_curves(output: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's curves, read the way TensorBoard reads them."""
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_after_a_kill(small: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps logged beyond the last checkpoint are computed again, and count once."""

    def die(losses: Any) -> Any:
        raise KeyboardInterrupt

    small = replace(small, save_every=3)
    with monkeypatch.context() as patch:
        on_call(patch, 6, die)
        with pytest.raises(KeyboardInterrupt):
            train.train(small)
    checkpoint = small.output / "checkpoint"
    assert [step for step, _ in read_curves(small.output)["loss"]] == [1, 2, 3, 4, 5]
    assert read_training(checkpoint)["steps_done"] == 3

    time.sleep(1.1)  # the names of the event files count seconds, and order them
    losses = read_losses(train.train(replace(small, resume=checkpoint)))
    curves = read_curves(small.output)
    assert curves.keys() == CURVES
    for name, points in curves.items():
        assert [step for step, _ in points] == [1, 2, 3, 4, 5, 6, 7], name
    np.testing.assert_allclose([value for _, value in curves["loss"]], losses, rtol=1e-6)
    both = [mse[1] + bound[1] for mse, bound in zip(curves["mse"], curves["variational"], strict=True)]
    np.testing.assert_allclose(both, losses, rtol=1e-5)
    assert [rate for _, rate in curves["learning_rate"]][:3] == pytest.approx([0, 1.5e-3, 3e-3])
    assert all(value > 0 for _, value in curves["images_per_second"])


def test_log_entries_are_means(small: TrainConfig) -> None:
    losses = read_losses(train.train(replace(small, log_every=3)))
    assert len(losses) == 7
    curve = dict(read_curves(small.output)["loss"])  # the last entry comes with the checkpoint
    assert curve == pytest.approx({3: np.mean(losses[:3]), 6: np.mean(losses[3:6]), 7: losses[6]})


def test_progress_shows_throughput_and_memory(small: TrainConfig, capfd: pytest.CaptureFixture[str]) -> None:
    train.train(replace(small, steps=2))
    bar = capfd.readouterr().err
    assert "2/2" in bar and "images/s" in bar and "GiB" in bar and "loss" in bar


def test_checkpoint_holds_the_model_and_the_full_configuration(small: TrainConfig) -> None:
    checkpoint = train.train(replace(small, steps=2))
    recorded = read_training(checkpoint)
    assert recorded.keys() == {"steps_done", "train", "model", "data", "versions"}
    assert from_json(recorded["train"]) == replace(small, steps=2)
    assert recorded["data"] == FewDigits().describe()
    assert recorded["versions"]["torch"] == torch.__version__
    model = load_ema_model(checkpoint)
    assert (
        model.config
        == configs.from_json(recorded["model"])
        == configs.config_of("dydi-lit", "tiny", in_channels=1, num_classes=10)
    )
    assert not model.training
    assert (small.output / "loss.png").stat().st_size > 0
    assert sorted(path.name for path in small.output.iterdir()) == ["checkpoint", "loss.png", "tensorboard"]
    names = {"README.md", "config.json", "losses.json", "model.safetensors", "state", "training.json"}
    assert {path.name for path in checkpoint.iterdir()} == names


def test_archive_keeps_numbered_checkpoints(small: TrainConfig, tmp_path: Path) -> None:
    straight = train.train(replace(small, save_every=2, archive_every=4))
    archive = small.output / "checkpoint-0000004"
    assert [path.name for path in small.output.glob("checkpoint-*")] == [archive.name]
    assert read_training(archive)["steps_done"] == 4
    assert_same(train.train(replace(small, resume=archive, output=tmp_path / "other")), straight)


def test_diverged_run_keeps_the_last_checkpoint(small: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(small, save_every=2)
    on_call(monkeypatch, 4, lambda losses: losses._replace(total=losses.total * float("nan")))
    with pytest.raises(Diverged, match="the loss of step 4 is nan"):
        train.train(small)
    assert read_training(small.output / "checkpoint")["steps_done"] == 2
    assert all(weight.isfinite().all() for weight in read_state(small.output / "checkpoint").weights.values())


@pytest.mark.parametrize("step", [3, 4])
@pytest.mark.parametrize("clip", [1.0, None])
def test_a_gradient_that_is_not_finite_is_not_saved(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch, step: int, clip: float | None
) -> None:
    """The loss is finite still, at a step that saves and at one that does not; the run can go on from before."""
    straight = train.train(replace(small, gradient_clip=clip))
    small = replace(small, save_every=2, log_every=2, gradient_clip=clip, output=small.output / "again")
    with monkeypatch.context() as patch:
        on_call(patch, step, lambda losses: losses._replace(total=losses.total + 0 * (0 * losses.total).sqrt()))
        with pytest.raises(Diverged, match=rf"the norm of the gradient of step {step} is nan, with a loss of \d"):
            train.train(small)
    checkpoint = small.output / "checkpoint"
    assert read_training(checkpoint)["steps_done"] == 2
    assert_same(train.train(replace(small, resume=checkpoint)), straight)


def test_the_loss_scale_of_fp16_leaves_out_steps_without_a_finite_gradient(tmp_path: Path) -> None:
    """There the norm is infinite now and then, while weights stay finite: no reason to end."""
    losses = Losses(*torch.ones(3))
    for scaler in (object(), None):
        accelerator = SimpleNamespace(
            scaler=scaler, is_main_process=False, reduce=lambda rows, how: rows, device=torch.device("cpu")
        )
        recorder = Recorder(accelerator, [], folder=tmp_path, steps=1, batch_size=1)  # type: ignore[arg-type]
        recorder.add(losses, torch.tensor(float("inf")))
        if scaler is None:
            with pytest.raises(Diverged, match="the gradient of step 1 is inf"):
                recorder.flush(1e-3)
        else:
            recorder.flush(1e-3)
        assert recorder.losses == ([] if scaler is None else [1.0])


@pytest.mark.parametrize("part", ["weights", "averages", "moments"])
def test_what_is_not_finite_is_not_saved(small: TrainConfig, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    small, update = replace(small, save_every=2), train.Run.update

    def poisoned(run: train.Run) -> torch.Tensor:
        norm = update(run)
        if len(run.losses) == 3:  # the fourth step
            tensor = {
                "weights": run.network.output.weight,
                "averages": run.average.module.output.weight,
                "moments": run.optimizer.optimizer.state[run.network.output.weight]["exp_avg_sq"],
            }[part]
            tensor.data[0, 0] = float("inf")
        return norm

    monkeypatch.setattr(train.Run, "update", poisoned)
    with pytest.raises(Diverged, match=rf"after step 4 the {part} of output\.weight\S* are not all finite"):
        train.train(small)
    assert read_training(small.output / "checkpoint")["steps_done"] == 2


@pytest.mark.parametrize("name", ["model", "state/weights", "state/moments"])
def test_a_checkpoint_that_is_not_finite_is_refused(small: TrainConfig, name: str) -> None:
    checkpoint = train.train(replace(small, steps=2))
    file = checkpoint / f"{name}.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.startswith("output.weight"))
    tensors[key][..., 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"output\.weight"):
        train.train(replace(small, resume=checkpoint))
