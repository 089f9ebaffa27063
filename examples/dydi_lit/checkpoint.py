"""The layout of a checkpoint, which is a folder, written and read here only.

- config.json, model.safetensors, README.md: the averaged (EMA) model as huggingface_hub writes it, all that sampling
  needs; `DiffusionTransformer.from_pretrained(folder)` reads it
- training.json: steps_done, the full configuration of the run (train) and of the network (model), what the data were
  (data), and the versions of the libraries
- losses.json: the loss of every step so far
- state/: what resuming needs as well: the raw weights, AdamW's moments, and the counters of schedule and loss scale
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.dydi_lit.configs import from_json as config_from_json
from examples.dydi_lit.data import DataError
from examples.dydi_lit.model import DiffusionTransformer
from examples.dydi_lit.model_card import card_kwargs
from examples.dydi_lit.parallel import processes


class CheckpointError(Exception):
    """A checkpoint that is missing, incomplete, damaged, or of another run than the one asked for."""


class State(NamedTuple):
    """What resuming needs beside the averaged weights; tensors on the CPU, whole, whatever they were sharded over."""

    weights: dict[str, Tensor]
    """The network's state dict."""
    moments: dict[str, Tensor]
    """The optimiser's tensors, named <parameter>.<moment>."""
    counters: dict[str, Any]
    """The state dicts of schedule and loss scale, in JSON's types."""


@contextmanager
def plain_errors(*others: type[Exception]) -> Iterator[None]:
    """Ends a command with one line, instead of a traceback, where a checkpoint or the data are at fault.

    `others` are further exceptions to treat so.
    """
    expected: tuple[type[Exception], ...] = (CheckpointError, DataError, *others)
    try:
        yield
    except expected as error:
        raise SystemExit(f"error: {error}") from None


def save_checkpoint(
    folder: Path, averaged: DiffusionTransformer, training: dict[str, Any], losses: list[float], state: State
) -> None:
    """Writes beside `folder` and swaps at the end: a crash while writing leaves the checkpoint from before.

    Where `folder` is a link, this is so of what it leads to. `training` is the content of training.json. One process
    calls this, that of rank 0.
    """
    folder = folder.resolve()
    partial, previous = _beside(folder, "partial"), _beside(folder, "previous")
    shutil.rmtree(partial, ignore_errors=True)
    averaged.save_pretrained(partial, model_card_kwargs=card_kwargs(training))
    (partial / "training.json").write_text(json.dumps(training, indent=2) + "\n")
    (partial / "losses.json").write_text(json.dumps(losses))
    (partial / "state").mkdir()
    save_file(state.weights, partial / "state" / "weights.safetensors")
    save_file(state.moments, partial / "state" / "moments.safetensors")
    (partial / "state" / "counters.json").write_text(json.dumps(state.counters))

    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    partial.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


def read_training(folder: Path) -> dict[str, Any]:
    """training.json: steps_done, train, model, data, versions; CheckpointError where it is not there or damaged."""
    training = _read_json(folder, "training.json", dict)
    data = training.get("data")
    if (
        type(training.get("steps_done")) is not int
        or not isinstance(training.get("train"), dict)
        or not isinstance(data, dict)
        or not isinstance(data.get("kind"), str)
        or type(data.get("size")) is not int
        or not isinstance(data.get("class_names"), list)
    ):
        raise CheckpointError(f"{folder / 'training.json'} is damaged: it does not tell what was trained on which data")
    return training


def read_losses(folder: Path) -> list[float]:
    """The loss of every step up to the checkpoint; CheckpointError where it is not there or damaged."""
    losses = _read_json(folder, "losses.json", list)
    if not all(isinstance(loss, float) for loss in losses):
        raise CheckpointError(f"{folder / 'losses.json'} is damaged: it must hold numbers")
    return losses


def read_state(folder: Path) -> State:
    """What resuming needs beside the averaged weights; CheckpointError names the file that is missing or damaged."""
    weights, moments = (_read_tensors(folder / "state" / f"{name}.safetensors") for name in ("weights", "moments"))
    for file, tensors in (("weights", weights), ("moments", moments)):
        if name := first_not_finite(tensors):
            raise CheckpointError(f"cannot resume: {folder / 'state' / file}.safetensors is not all finite, in {name}")
    return State(weights, moments, _read_json(folder, "state/counters.json", dict))


def load_ema_model(folder: Path, *, fuse: bool = True) -> DiffusionTransformer:
    """The averaged model, in `eval`, on accelerate's default device; `fuse` puts its attention in inference form."""
    model = load_network(folder)
    return (model.fuse() if fuse else model).to(processes().device)


def load_network(folder: Path) -> DiffusionTransformer:
    """The model of config.json and model.safetensors, in `eval`, on the CPU; CheckpointError where they do not fit."""
    fields = _read_json(folder, "config.json", dict)
    try:
        config = config_from_json(fields)
        weights = load_file(folder / "model.safetensors")
        if config.depth > len(weights):  # before a network is built that the file has no weights for
            raise ValueError(f"depth is {config.depth}, but there are {len(weights)} tensors only")
        with torch.device("meta"):  # so that nothing is allocated for sizes that the file does not have
            model = DiffusionTransformer(config)
        model.load_state_dict({name: t.float() for name, t in weights.items()}, assign=True)
        if name := first_not_finite(weights):
            raise ValueError(f"{name} is not all finite")
    except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot load {folder / 'model.safetensors'} with its config.json: {error}") from error
    return model.eval()


def first_not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor with an entry that is infinite or not a number; None where there is none."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot resume: {file} cannot be loaded: {error}") from error


def _read_json(folder: Path, name: str, kind: type) -> Any:
    """A file that holds one list or, for `kind` dict, one object."""
    try:
        found = json.loads((folder / name).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(_not_there(folder, name)) from None
    except ValueError as error:  # not JSON, or not even text
        raise CheckpointError(f"{folder / name} is damaged: {error}") from None
    if not isinstance(found, kind):
        raise CheckpointError(f"{folder / name} is damaged: it must hold a {kind.__name__}, not {found!r:.40}")
    return found


def _not_there(folder: Path, name: str) -> str:
    message = f"no checkpoint at {folder}: there is no {folder / name}"
    previous = _beside(folder.resolve(), "previous")
    return f"{message}; a run killed while saving left {previous}, which is whole" if previous.exists() else message


def _beside(folder: Path, role: str) -> Path:
    return folder.with_name(f"{folder.name}.{role}")
