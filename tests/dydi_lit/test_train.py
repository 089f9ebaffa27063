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

from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
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
from examples.dydi_lit.settings import SettingsError, from_json
from examples.dydi_lit.train import Interrupted, TrainConfig
from tests.dydi_lit.training import FewDigits, assert_same, interrupt_at, on_call

ROOT = Path(__file__).parents[2]
CURVES = {"loss", "mse", "variational", "gradient_norm", "learning_rate", "images_per_second"}


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


@pytest.mark.parametrize("model", ["dit", "sana", "pixart-sigma", "edit", "dig", "lit", "moh-dit"])
def test_every_kind_of_attention_resumes_to_the_bit(small: TrainConfig, tmp_path: Path, model: configs.Model) -> None:
    straight = train.train(replace(small, model=model, steps=4, save_every=2, archive_every=2))
    half = small.output / "checkpoint-0000002"
    resumed = replace(small, model=model, steps=4, save_every=2, archive_every=2, output=tmp_path / "again")
    assert_same(train.train(replace(resumed, resume=half)), straight)


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


def test_the_balance_of_heads_is_trained_and_not_logged(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = replace(small, model="moh-dit", steps=1, warmup_steps=0, gradient_clip=None)
    with_balance = train.train(one)
    monkeypatch.setattr(train.DiffusionTransformer, "balance", lambda network: 0.0)
    without = train.train(replace(one, output=tmp_path / "without"))
    assert read_losses(with_balance) == read_losses(without)
    ours, theirs = (read_state(folder).moments for folder in (with_balance, without))
    name = "blocks.0.attention.routed_router.weight.exp_avg"
    assert not torch.equal(ours[name], theirs[name])
    assert torch.equal(ours["output.weight.exp_avg"], theirs["output.weight.exp_avg"])


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


@pytest.mark.parametrize("there", [True, False])
def test_a_checkpoint_that_is_a_link(small: TrainConfig, tmp_path: Path, there: bool) -> None:
    """What it leads to is written, as often as one likes."""
    elsewhere = tmp_path / "elsewhere"
    if there:
        elsewhere.mkdir()
    small.output.mkdir()
    (small.output / "checkpoint").symlink_to(elsewhere)
    straight = train.train(replace(small, output=tmp_path / "straight"))
    linked = train.train(replace(small, save_every=2))
    assert linked.is_symlink() and linked.resolve() == elsewhere
    assert_same(linked, straight)
    assert not list(tmp_path.glob("elsewhere.*"))


@pytest.mark.usefixtures("other_precision")
def test_the_environment_does_not_scale_gradients(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train.train(small)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    GradientState._reset_state()
    assert_same(train.train(replace(small, output=tmp_path / "other")), straight)
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    GradientState._reset_state()


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_accelerates_own_sharding_is_refused(small: TrainConfig, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    foreign = SimpleNamespace(distributed_type=DistributedType[kind], device=torch.device("cpu"))
    monkeypatch.setattr(train, "Accelerator", lambda **options: foreign)
    with pytest.raises(SettingsError, match=f"accelerate is configured for {kind}"):
        train.train(small)
