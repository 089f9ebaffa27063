"""Files that are damaged, foreign or malicious are refused with a clear error, and nothing of them is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("examples.dydi_lit")

from safetensors.torch import load_file, save_file

from examples.dydi_lit import settings, train
from examples.dydi_lit.checkpoint import CheckpointError, load_network, read_losses, read_state, read_training
from examples.dydi_lit.configs import ModelConfig, config_of, from_json, to_json
from examples.dydi_lit.data import DataError
from examples.dydi_lit.evaluate import open_images
from examples.dydi_lit.latents import LatentIndex, read_index, read_labels
from examples.dydi_lit.model import DiffusionTransformer
from examples.dydi_lit.pipeline import DyDiLiTPipeline, scheduler_of
from examples.dydi_lit.train import TrainConfig


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


@pytest.fixture(params=["pickle", "torch.save", "numpy"])
def bomb(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """The bytes of a file that executes code where it is unpickled; fails the test that did so."""
    marker = tmp_path / "executed"
    buffer = io.BytesIO()
    if request.param == "pickle":
        pickle.dump({"weight": Bomb(marker)}, buffer)
    elif request.param == "torch.save":
        torch.save({"weight": Bomb(marker)}, buffer)
    else:
        numpy = pytest.importorskip("numpy")
        numpy.savez(buffer, arr_0=numpy.array([Bomb(marker)], dtype=object))
    yield buffer.getvalue()
    assert not marker.exists()


def test_the_bomb_goes_off(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def config(**changes: Any) -> ModelConfig:
    return config_of("dydi-lit", "tiny", **{"dim": 32, "depth": 2, "in_channels": 1, "num_classes": 10, **changes})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model's config.json and model.safetensors."""
    DiffusionTransformer(config()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# --- configurations


@pytest.mark.parametrize(
    "changes",
    [
        {"dim": "64"}, {"dim": 64.0}, {"dim": True}, {"dim": -64}, {"dim": 0}, {"dim": 6}, {"dim": None},
        {"depth": 0}, {"depth": [9]}, {"num_heads": 5}, {"num_heads": -1}, {"attention": "nothing"},
        {"attention": ["dydila"]}, {"ffn_ratio": float("inf")}, {"ffn_ratio": float("nan")}, {"ffn_ratio": -1.0},
        {"num_projectors": -1}, {"num_kernel_factors": 0}, {"lambda_init": [0.1]}, {"lambda_init": ["a", "b"]},
        {"lambda_init": 0.1}, {"lambda_init": [float("nan"), 0]}, {"dwc_branches": ["5x5"]}, {"dwc_branches": "3x3"},
        {"learned_gamma": "yes"}, {"learn_sigma": 1}, {"patch_size": 0}, {"num_classes": -10}, {"unknown": 1},
        {"__class__": "os.system"}, {"depth": 10**9}, {"dim": 2**40}, {"num_projectors": 2**50}, {"dim": 2**80},
        {"num_classes": 2**62}, {"ffn_ratio": 1e300},
    ],
    ids=str,
)  # fmt: skip
def test_a_configuration_that_is_none_or_does_not_fit(saved: Path, changes: dict[str, Any]) -> None:
    """Wrong types, unknown fields, values out of range, and sizes that would fill any memory."""
    edit(saved / "config.json", **changes)
    with pytest.raises(CheckpointError, match=r"cannot load .*model\.safetensors with its config\.json: "):
        load_network(saved)


def test_a_configuration_survives_json() -> None:
    for model in ("dydi-lit", "dit", "sana", "increasing-lambda"):
        found = config_of(model)
        assert from_json(json.loads(json.dumps(to_json(found)))) == found


@pytest.mark.parametrize(
    "changes",
    [{"steps": "many"}, {"seed": 1.5}, {"flip": "no"}, {"parallel": "magic"}, {"learning_rate": None}, {"output": 3},
     {"unknown": 1}, {"schedule": ["cosine"]}],
    ids=str,
)  # fmt: skip
def test_the_configuration_of_a_run(changes: dict[str, Any]) -> None:
    values = json.loads(json.dumps(settings.to_json(TrainConfig())))
    assert settings.from_json(values) == TrainConfig()
    with pytest.raises(CheckpointError, match="not the configuration of a training run"):
        settings.from_json({**values, **changes})


# --- weights


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def change_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.unlink(),
        lambda file: cut(file, 0),
        lambda file: cut(file, 0.001),
        lambda file: cut(file, 0.9),
        lambda file: file.write_bytes(b"\xff" * 8 + b"{}"),
        lambda file: file.write_bytes((2).to_bytes(8, "little") + b"{]"),
        lambda file: change_weights(file, lambda t: t.pop("output.bias")),
        lambda file: change_weights(file, lambda t: t.update({"more": torch.ones(1)})),
        lambda file: change_weights(file, lambda t: t.update({"output.bias": torch.ones(3)})),
        lambda file: change_weights(file, lambda t: t.update({"../../evil": t.pop("output.bias")})),
    ],
    ids=["none", "empty", "header cut", "cut", "huge header", "no JSON", "fewer", "more", "shape", "name"],
)
def test_damaged_weights(saved: Path, spoil: Callable[[Path], Any]) -> None:
    spoil(saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot load .*model\.safetensors"):
        load_network(saved)


def test_weights_of_another_dtype_become_float32(saved: Path) -> None:
    expected = load_network(saved).state_dict()
    change_weights(saved / "model.safetensors", lambda t: t.update({name: v.double() for name, v in t.items()}))
    found = load_network(saved)
    assert all(torch.equal(t, expected[name]) for name, t in found.state_dict().items())
    assert not any(p.requires_grad for name, p in found.named_parameters() if "router" in name)


def test_no_loader_of_the_kit_unpickles(saved: Path, bomb: bytes, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json", "training.json", "losses.json", "index.json"):
        (saved / name).write_bytes(bomb)
        loaders = {
            "model.safetensors": load_network,
            "config.json": load_network,
            "training.json": read_training,
            "losses.json": read_losses,
            "index.json": read_index,
        }
        with pytest.raises((CheckpointError, DataError)):
            loaders[name](saved)
    (saved / "state").mkdir()
    for name in ("weights.safetensors", "moments.safetensors"):
        (saved / "state" / name).write_bytes(bomb)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors cannot be loaded"):
        read_state(saved)
    with pytest.raises(DataError, match="is damaged"):
        read_labels(saved / "state" / "weights.safetensors", INDEX)
    (tmp_path / "images.npz").write_bytes(bomb)
    with pytest.raises(DataError, match="cannot read"):
        open_images(str(tmp_path / "images.npz"))


def test_the_hub_loader_does_not_unpickle(saved: Path, bomb: bytes) -> None:
    """Nor does `from_pretrained` of huggingface_hub, for a folder with weights of another kind."""
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(Exception, match=r"model\.safetensors|No such file"):
        DiffusionTransformer.from_pretrained(saved)


# --- checkpoints of a run


@pytest.mark.parametrize("name", ["training.json", "losses.json", "state/counters.json"])
@pytest.mark.parametrize("text", ["", "{", "null", "3", '"text"', "\udcff"], ids=repr)
def test_json_of_a_checkpoint(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    if name == "state/counters.json":
        for tensors in ("weights", "moments"):
            save_file({}, tmp_path / "state" / f"{tensors}.safetensors")
    read: Any = {"training.json": read_training, "losses.json": read_losses, "state/counters.json": read_state}[name]
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        read(tmp_path)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: edit(folder / "training.json", data=[]), r"training\.json is damaged"),
        (lambda folder: edit(folder / "training.json", steps_done="all"), r"training\.json is damaged"),
        (lambda folder: edit(folder / "training.json", train=None), r"training\.json is damaged"),
        (lambda folder: (folder / "losses.json").write_text('["low"]'), r"losses\.json is damaged"),
        (
            lambda folder: edit(folder / "state" / "counters.json", schedule={"optimizer": 1}),
            "the schedule was not saved",
        ),
        (lambda folder: edit(folder / "state" / "counters.json", schedule=3), "the schedule was not saved"),
        (lambda folder: edit(folder / "state" / "counters.json", loss_scale=3), "the loss scale must"),
        (
            lambda folder: change_weights(
                folder / "state" / "moments.safetensors", lambda t: t.update({"evil.step": torch.ones(())})
            ),
            r"no parameter has a moment evil\.step",
        ),
        (
            lambda folder: change_weights(
                folder / "state" / "moments.safetensors", lambda t: t.update({"output.bias.exp_avg": torch.ones(1)})
            ),
            r"no parameter has a moment output\.bias\.exp_avg of shape \(1,\)",
        ),
        (
            lambda folder: change_weights(folder / "state" / "weights.safetensors", lambda t: t.pop("output.bias")),
            "the weights in .* are of another network",
        ),
    ],
)
def test_a_run_is_not_resumed_from_what_is_damaged(
    small: TrainConfig, tmp_path: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    checkpoint = train.train(replace(small, steps=1))
    spoil(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        train.train(replace(small, resume=checkpoint, output=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


# --- latents


INDEX = LatentIndex("vae", "0" * 64, 0.5, 64, 4, 8, 2, ["cat", "dog"], 5, "0" * 64, 2)


@pytest.mark.parametrize(
    "changes",
    [{"shard_size": 0}, {"shard_size": -1}, {"num_files": "5"}, {"size": 0}, {"channels": 1.5}, {"class_names": "cat"},
     {"class_names": [1]}, {"scaling_factor": float("nan")}, {"orientations": 3}, {"unknown": 1}],
    ids=str,
)  # fmt: skip
def test_an_index_of_latents(tmp_path: Path, changes: dict[str, Any]) -> None:
    file = tmp_path / "index.json"
    file.write_text(json.dumps(asdict(INDEX)))
    assert read_index(tmp_path) == INDEX
    edit(file, **changes)
    with pytest.raises(DataError, match=r"index\.json is not an index of latents"):
        read_index(tmp_path)


# --- pipelines


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    model = DiffusionTransformer(config())
    DyDiLiTPipeline(model, scheduler_of(model.config, clip=True), size=8).save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"DyDiLiTPipeline"', "\udcff"], ids=repr)
@pytest.mark.parametrize("name", ["model_index.json", "training.json"])
def test_json_of_a_pipeline(pipeline: Path, name: str, text: str) -> None:
    (pipeline / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        DyDiLiTPipeline.from_pretrained(pipeline)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scheduler": "os"}, "the scheduler of .* must be"),
        ({"scheduler": 7}, "the scheduler of .* must be"),
        ({"scheduler": {"0": "diffusers"}}, "the scheduler of .* must be"),
        ({"scheduler": ["diffusers"]}, "the scheduler of .* must be"),
        ({"scheduler": ["diffusers", "utils"]}, "the scheduler of .* must be"),
        ({"scheduler": ["diffusers.utils", "load_image"]}, "the scheduler of .* must be"),
        ({"vae": ["diffusers", "../../evil"]}, "the vae of .* must be"),
        ({"transformer": ["evil", "Evil"]}, "the transformer of .* must be"),
        ({"_class_name": ["evil", "DyDiLiTPipeline"]}, "must hold a DyDiLiTPipeline"),
        ({"size": "big"}, "size must be"),
        ({"size": -2}, "size must be"),
        ({"size": 3}, "size must be"),
        ({"class_names": "abc"}, "class_names must"),
    ],
    ids=str,
)
def test_the_index_of_a_pipeline(pipeline: Path, changes: dict[str, Any], message: str) -> None:
    for folder in (pipeline, pipeline / "scheduler", pipeline / "evil"):
        folder.mkdir(exist_ok=True)
        (folder / "evil.py").write_text("raise SystemExit('executed')")
    edit(pipeline / "model_index.json", **changes)
    with pytest.raises(ValueError, match=message):
        DyDiLiTPipeline.from_pretrained(pipeline)


def test_a_component_that_nobody_asked_for_is_not_loaded(pipeline: Path) -> None:
    (pipeline / "evil").mkdir()
    (pipeline / "evil" / "evil.py").write_text("raise SystemExit('executed')")
    edit(pipeline / "model_index.json", evil=["evil", "Evil"], more=["os", "system"])
    loaded = DyDiLiTPipeline.from_pretrained(pipeline)
    assert loaded.components.keys() == {"transformer", "scheduler", "vae"}


def test_no_component_is_unpickled(pipeline: Path, bomb: bytes) -> None:
    edit(pipeline / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    (pipeline / "vae").mkdir()
    (pipeline / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        (pipeline / "vae" / name).write_bytes(bomb)
        with pytest.raises(OSError, match="diffusion_pytorch_model"):
            DyDiLiTPipeline.from_pretrained(pipeline)
        (pipeline / "vae" / name).unlink()
    (pipeline / "transformer" / "model.safetensors").write_bytes(bomb)
    with pytest.raises(ValueError, match="cannot load the transformer"):
        DyDiLiTPipeline.from_pretrained(pipeline)
