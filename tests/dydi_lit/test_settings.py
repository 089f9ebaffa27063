"""What training refuses, and its command."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("examples.dydi_lit")


from examples.dydi_lit import settings, train
from examples.dydi_lit.batches import Share
from examples.dydi_lit.checkpoint import CheckpointError, load_ema_model, plain_errors, read_losses, read_training
from examples.dydi_lit.data import DataError
from examples.dydi_lit.settings import SettingsError, from_json, to_json
from examples.dydi_lit.train import TrainConfig
from tests.dydi_lit.training import interrupt_at


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
    train.main()


def test_uneven_shares_are_refused(small: TrainConfig) -> None:
    accelerator: Any = SimpleNamespace(num_processes=2, process_index=1)
    assert train.share_of(replace(small, accumulate=2), accelerator) == Share(8, 2, 2, 1)
    message = "batch_size must divide by the number of processes times accumulate, 2 x 3; got 8"
    with pytest.raises(SettingsError, match=message):
        train.share_of(replace(small, accumulate=3), accelerator)


# --- what is refused


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"seed": -1}, "seed must be at least 0; got -1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"label_dropout": 1.5}, r"label_dropout must be in 0\.\.1; got 1.5"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive; got nan"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"gradient_clip": 0.0}, "gradient_clip must be positive, or None for no clipping; got 0.0"),
        ({"archive_every": 700}, "archive_every must be a multiple of save_every, 500; got 700"),
        ({"accumulate": 3}, "batch_size must divide by"),
        ({"batch_size": 48}, "batch_size is 48, but there are 40 images only"),
    ],
)
def test_settings_out_of_range_are_refused(small: TrainConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        train.train(replace(small, **change))
    assert not small.output.exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 works on a GPU")
def test_fp16_needs_a_gpu(small: TrainConfig, other_precision: None) -> None:
    with pytest.raises(SettingsError, match="mixed_precision = fp16 needs a GPU"):
        train.train(replace(small, mixed_precision="fp16"))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "state/weights.safetensors", "state/moments.safetensors", "losses.json"]
)
def test_damaged_files_are_named(small: TrainConfig, name: str) -> None:
    checkpoint = train.train(replace(small, steps=1))
    file = checkpoint / name
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=str(file)):
        train.train(replace(small, resume=checkpoint))
    file.unlink()
    with pytest.raises(CheckpointError, match=str(file)):
        train.train(replace(small, resume=checkpoint))


def test_training_json_of_something_else_is_refused(small: TrainConfig) -> None:
    checkpoint = train.train(replace(small, steps=1))
    (checkpoint / "training.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"training\.json is damaged"):
        read_training(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*config\.json"):
        load_ema_model(checkpoint)
    with pytest.raises(CheckpointError, match="not the configuration of a training run"):
        from_json({"colour": "red"})


def test_kill_between_the_two_renames_loses_nothing(small: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(small, save_every=3)
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.name == "checkpoint.partial" and target.with_name("checkpoint.previous").exists():
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            train.train(small)
    with pytest.raises(CheckpointError, match=r"killed while saving left .*checkpoint\.previous, which is whole"):
        read_training(small.output / "checkpoint")
    assert len(read_losses(train.train(replace(small, resume=small.output / "checkpoint.previous")))) == 7


# --- command


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(monkeypatch, "--help")
    assert ended.value.code == 0
    assert "Images of an optimiser step" in " ".join(capsys.readouterr().out.replace("│", "").split())


def test_configuration_survives_json(small: TrainConfig) -> None:
    config = replace(small, data="images", data_path=Path("a"), image_size=32, classes=Path("b"), gradient_clip=None)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert settings.FREE_ON_RESUME - to_json(config).keys() == {"resume"}


def test_missing_checkpoint_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: no checkpoint at .*nowhere"):
        run_command(monkeypatch, "--resume", tmp_path / "nowhere")


@pytest.mark.parametrize("error", [CheckpointError("broken"), DataError("broken"), SettingsError("broken")])
def test_expected_errors_are_one_line(error: Exception) -> None:
    with pytest.raises(SystemExit, match=r"^error: broken$"), plain_errors(SettingsError):
        raise error
    with pytest.raises(RuntimeError), plain_errors(SettingsError):
        raise RuntimeError


def test_interrupted_command_says_how_to_resume(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--output", small.output, "--steps", 4, "--batch-size", 8, "--log-every", 1]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(SystemExit, match=r"interrupted after step 2; resume with: .* --resume ") as stop:
            run_command(patch, *options)
    resume = str(stop.value.code).split()[-2:]
    with pytest.raises(SystemExit, match=r"error: .* was trained with batch_size = 8, not 4"):
        run_command(monkeypatch, *resume, "--batch-size", 4)
    run_command(monkeypatch, *resume)  # takes steps and batch size from the checkpoint
    assert len(read_losses(small.output / "checkpoint")) == 4
    assert "wrote" in capsys.readouterr().out
