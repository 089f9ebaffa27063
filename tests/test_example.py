"""The DyDi-LiT example: its parts, and that an interrupted run ends where an uninterrupted one does."""

import importlib
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

pytest.importorskip("examples.dydi_lit")

import examples.dydi_lit
from examples.dydi_lit import demo, sample, score, train
from examples.dydi_lit.checkpoint import CheckpointError, load_ema_model, read_config, read_losses
from examples.dydi_lit.data import digits, to_pixels
from examples.dydi_lit.figures import as_text, save_grid, save_loss_curve
from examples.dydi_lit.model import SIZES, DyDiLiT, config_of_size, position_embedding

SMALL = replace(SIZES["tiny"], dim=32, depth=2, ffn_ratio=1.0, patch_size=2)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def small_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> train.TrainConfig:
    """Seven quick steps on 40 digits: five batches to an epoch, so that the run crosses into a second one."""
    images, labels = digits("train").tensors
    monkeypatch.setitem(SIZES, "tiny", SMALL)
    monkeypatch.setattr(train, "digits", lambda split: TensorDataset(images[:40], labels[:40]))
    return train.TrainConfig(output=tmp_path / "run", steps=7, batch_size=8, warmup_steps=2)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Sends SIGINT to this process in the middle of step number `step`, counted from 1."""
    whole, calls = train.noise_loss, []

    def noise_loss(*arguments: object) -> torch.Tensor:
        calls.append(None)
        if len(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return whole(*arguments)

    monkeypatch.setattr(train, "noise_loss", noise_loss)


# --- model


@pytest.mark.parametrize("patch, size", [(1, (8, 8)), (1, (6, 10)), (2, (8, 12))])
def test_model_follows_the_image(patch: int, size: tuple[int, int]) -> None:
    model = DyDiLiT(replace(SMALL, patch_size=patch, in_channels=3))
    image = torch.randn(2, 3, *size)
    noise = model(image, torch.tensor([3, 900]), torch.tensor([0, model.null_class]))
    assert noise.shape == image.shape
    assert not noise.any()  # the last layer starts at zero
    noise.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def test_patches_keep_their_place() -> None:
    """A fresh model is linear from patch to patch; with the identity in both linear layers it returns its input."""
    model = DyDiLiT(replace(SMALL, patch_size=2, in_channels=2))
    torch.nn.init.eye_(model.patch_embedding.weight)
    torch.nn.init.zeros_(model.patch_embedding.bias)
    torch.nn.init.eye_(model.output.weight)
    model.norm = torch.nn.Identity()  # type: ignore[assignment]
    image = torch.randn(1, 2, 4, 6)
    without_place = model(image, torch.tensor([0]), torch.tensor([0])) - model(
        torch.zeros_like(image), torch.tensor([0]), torch.tensor([0])
    )
    torch.testing.assert_close(without_place, image)


def test_position_embedding_tells_rows_from_columns() -> None:
    table = position_embedding((3, 5), 16, torch.device("cpu")).unflatten(0, (3, 5))
    assert len(table.flatten(0, 1).unique(dim=0)) == 15
    assert torch.equal(table[1, :, :8], table[1, :1, :8].expand(5, 8))  # one row, one first half
    assert torch.equal(table[:, 2, 8:], table[:1, 2, 8:].expand(3, 8))


def test_model_reports_bad_arguments() -> None:
    model = DyDiLiT(replace(SMALL, patch_size=2))
    with pytest.raises(ValueError, match="7x8 pixels does not divide"):
        model(torch.zeros(1, 4, 7, 8), torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(ValueError, match="unknown size 'XXL': choose one of tiny, S, B, L"):
        config_of_size("XXL")
    with pytest.raises(ValueError, match="multiple of 4"):
        DyDiLiT(replace(SMALL, dim=30))


# --- training


def test_resumed_run_equals_an_uninterrupted_one(
    small_run: train.TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    straight = train.train(small_run)

    handler = signal.getsignal(signal.SIGINT)
    halved = replace(small_run, output=tmp_path / "halved")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(train.Interrupted) as stopped:
            train.train(halved)
    checkpoint = stopped.value.checkpoint
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(read_losses(checkpoint)) == read_config(checkpoint)["steps_done"] == 3
    torch.rand(5)  # the resumed process is in another random state

    resumed = train.train(replace(halved, resume=checkpoint))
    assert read_losses(resumed) == read_losses(straight)
    ours, theirs = load_ema_model(resumed).state_dict(), load_ema_model(straight).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_same_seed_same_samples(small_run: train.TrainConfig, tmp_path: Path) -> None:
    runs = [train.train(replace(small_run, output=tmp_path / name)) for name in ("one", "two")]
    other = train.train(replace(small_run, output=tmp_path / "other", seed=1))
    labels = sample.labels_of(1)
    first, second, third = (sample.sample(load_ema_model(run), labels, steps=3) for run in (*runs, other))
    assert first.shape == (10, 1, 8, 8) and first.dtype == torch.float32 and first.abs().max() <= 1
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert not torch.equal(first, sample.sample(load_ema_model(runs[0]), labels, steps=3, seed=1))


def test_checkpoint_holds_the_averaged_model_and_its_configuration(small_run: train.TrainConfig) -> None:
    checkpoint = train.train(replace(small_run, steps=2))
    recorded = json.loads((checkpoint / "config.json").read_text())
    assert train.from_json(recorded["train"]) == replace(small_run, steps=2)
    model = load_ema_model(checkpoint)
    assert model.config == replace(SMALL, in_channels=1, num_classes=10)
    assert not model.training
    assert (small_run.output / "loss.png").stat().st_size > 0
    assert not checkpoint.with_name("checkpoint.partial").exists()


def test_guidance_one_is_the_estimate_for_the_label(small_run: train.TrainConfig) -> None:
    model = load_ema_model(train.train(replace(small_run, steps=4)))
    labels = sample.labels_of(1)
    plain = sample.sample(model, labels, guidance=1.0, steps=2)
    torch.testing.assert_close(sample.sample(model, labels, guidance=1.0 + 1e-6, steps=2), plain, atol=1e-4, rtol=0)


def test_label_dropout_reaches_the_null_class() -> None:
    seen: list[torch.Tensor] = []

    def model(noisy: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(labels)
        return torch.zeros_like(noisy)

    images, labels = digits("train").tensors
    schedule = train.DDPMScheduler(**train.NOISE_SCHEDULE)
    loss = train.noise_loss(model, schedule, images, labels, 0.1, torch.Generator().manual_seed(0))  # type: ignore
    assert abs(loss.item() - 1) < 0.02  # the mean square of the noise itself
    dropped = seen[0] == 10
    assert 0.07 < dropped.float().mean() < 0.13
    assert torch.equal(seen[0][~dropped], labels[~dropped])


# --- data and scores


def test_digits_are_split_once_and_for_all() -> None:
    training, held_out = digits("train"), digits("held-out")
    assert (len(training), len(held_out)) == (1437, 360)
    images, labels = training.tensors
    assert images.shape[1:] == (1, 8, 8) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert (images.min(), images.max()) == (-1, 1)
    assert torch.equal(images, digits("train").tensors[0])
    assert not {image.tobytes() for image in to_pixels(images)} & {
        image.tobytes() for image in to_pixels(held_out.tensors[0])
    }


def test_reader_reads_real_digits_and_notices_copies() -> None:
    reader = score.Reader()
    images, labels = digits("held-out").tensors
    real = reader.score(images, labels)
    assert real.count == 360 and real.read_right > 0.97 and real.to_training > 0
    assert reader.score(images, (labels + 1) % 10).read_right < 0.02
    assert reader.score(*digits("train")[:100]).to_training == 0
    assert reader.score(images[:1].expand(20, -1, -1, -1), labels[:1].expand(20)).within_class == 0


def test_figures_are_written(tmp_path: Path) -> None:
    save_grid(torch.zeros(7, 1, 8, 8), tmp_path / "new" / "grid.png", columns=3)
    save_loss_curve([1.0 / step for step in range(1, 80)], tmp_path / "loss.png")
    assert (tmp_path / "new" / "grid.png").stat().st_size > 0 and (tmp_path / "loss.png").stat().st_size > 0


def test_digits_as_text() -> None:
    black, white = -torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 3)
    row = "██" * 3 + " " * 3 + "  " * 3
    assert as_text(torch.cat([white, black, white]), columns=2) == "\n".join([row, row, "██" * 3, "██" * 3])


# --- commands


def run_command(command: object, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    command.main()  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", [train, sample, score, demo])
def test_help(command: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(command, monkeypatch, "--help")
    assert ended.value.code == 0
    assert "seed" in capsys.readouterr().out.lower()


def test_damaged_checkpoints_are_reported(small_run: train.TrainConfig) -> None:
    checkpoint = train.train(replace(small_run, steps=1))
    shutil.rmtree(checkpoint / "state")
    with pytest.raises(CheckpointError, match="cannot resume"):
        train.train(replace(small_run, resume=checkpoint))
    (checkpoint / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match=r"cannot load .*model\.safetensors"):
        load_ema_model(checkpoint)


@pytest.mark.parametrize("command, arguments", [(train, ["--resume"]), (sample, []), (score, [])])
def test_missing_checkpoint_is_one_line(
    command: object, arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=r"error: no checkpoint at .*nowhere"):
        run_command(command, monkeypatch, *arguments, str(tmp_path / "nowhere"))


def test_interrupted_command_says_how_to_resume(
    small_run: train.TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--output", str(small_run.output), "--steps", "4", "--batch-size", "8"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(
            SystemExit, match=r"interrupted after step 2; resume with: python -m .* --resume "
        ) as stopped:
            run_command(train, patch, *options)
    resume = str(stopped.value.code).split()[-2:]
    with pytest.raises(CheckpointError, match="holds a model of size 'tiny', not 'S'"):
        train.train(replace(small_run, size="S", resume=Path(resume[1])))
    run_command(train, monkeypatch, *resume)  # takes steps and batch size from the checkpoint
    assert len(read_losses(small_run.output / "checkpoint")) == 4
    assert "wrote" in capsys.readouterr().out


def test_demo_from_end_to_end(
    small_run: train.TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--output", str(small_run.output)]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(SystemExit, match=r"interrupted after step 1; resume with: python -m .*demo .* --resume"):
            run_command(demo, patch, *options, "--steps", "2")
    run_command(demo, monkeypatch, *options, "--resume")
    assert len(read_losses(small_run.output / "checkpoint")) == 2
    printed = capsys.readouterr().out
    assert "real, held out" in printed and "generated, guidance 1.5" in printed
    assert (small_run.output / "samples.png").exists() and (small_run.output / "loss.png").exists()


def test_missing_extra_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None if name == "tyro" else find_spec(name))
        with pytest.raises(ModuleNotFoundError, match=r"needs tyro: pip install dydila-kernels\[examples\]"):
            importlib.reload(examples.dydi_lit)
    importlib.reload(examples.dydi_lit)


@pytest.mark.slow
def test_ctrl_c_on_a_real_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.dydi_lit.train", "--output", str(tmp_path), "--save-every", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 50
    while not (tmp_path / "checkpoint").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=30)
    assert f"resume with: python -m examples.dydi_lit.train --resume {tmp_path / 'checkpoint'}" in printed
    assert process.returncode == 1
