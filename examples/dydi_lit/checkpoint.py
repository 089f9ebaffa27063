"""The layout of a checkpoint, which is a folder, written and read here only.

- config.json: the model's and the training run's configuration, and the number of steps done
- model.safetensors: the averaged (EMA) weights; with config.json, all that sampling needs
- losses.json: the loss of every step so far
- state/: what resuming needs as well, raw weights and optimiser, saved by accelerate
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from examples.dydi_lit.model import DyDiLiT, DyDiLiTConfig


class CheckpointError(Exception):
    """A checkpoint that is missing, incomplete, or of another model than the one asked for."""


@contextmanager
def plain_errors() -> Iterator[None]:
    """Ends a command with one line, instead of a traceback, where its checkpoint is at fault."""
    try:
        yield
    except CheckpointError as error:
        raise SystemExit(f"error: {error}") from None


def save_checkpoint(
    folder: Path, accelerator: Accelerator, ema: nn.Module, config: dict[str, Any], losses: list[float]
) -> None:
    """Writes beside `folder` and swaps at the end: a crash while writing leaves the checkpoint from before.

    `ema` is the averaged model; `config` has the keys model and train.
    """
    partial = folder.with_name(folder.name + ".partial")
    accelerator.save_state(str(partial / "state"))
    if accelerator.is_main_process:
        save_model(ema, str(partial / "model.safetensors"))
        (partial / "config.json").write_text(json.dumps({"steps_done": len(losses), **config}, indent=2) + "\n")
        (partial / "losses.json").write_text(json.dumps(losses))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    accelerator.wait_for_everyone()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dictionary with the keys steps_done, model, train; CheckpointError where it is not there."""
    return _read_json(folder, "config.json")


def read_losses(folder: Path) -> list[float]:
    """The loss of every step up to the checkpoint; CheckpointError where it is not there."""
    return _read_json(folder, "losses.json")


def load_ema_model(folder: Path) -> DyDiLiT:
    """The averaged model, in inference form (`eval`, attention fused), on accelerate's default device."""
    model = DyDiLiT(DyDiLiTConfig(**read_config(folder)["model"]))
    load_ema_weights(folder, model)
    return model.fuse().eval().to(PartialState().device)


def load_ema_weights(folder: Path, model: nn.Module) -> None:
    """Copies the averaged weights into `model`; CheckpointError where they are missing or do not fit."""
    try:
        load_model(model, str(folder / "model.safetensors"))
    except (FileNotFoundError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot load {folder / 'model.safetensors'}: {error}") from error


def _read_json(folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / name).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"no checkpoint at {folder}: there is no {folder / name}") from None
