"""A run that has diverged ends, and leaves the last good checkpoint as it was."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("examples.dydi_lit")

from safetensors.torch import load_file, save_file

from examples.dydi_lit import train
from examples.dydi_lit.checkpoint import CheckpointError, read_state, read_training
from examples.dydi_lit.diffusion import Losses
from examples.dydi_lit.recorder import Diverged, Recorder
from examples.dydi_lit.train import TrainConfig
from tests.dydi_lit.training import assert_same, on_call


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
