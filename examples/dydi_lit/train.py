"""Trains a DyDi-LiT on the digits: python -m examples.dydi_lit.train --help

Ctrl-C (or SIGTERM) ends the run after the current step with a checkpoint; a run resumed from it computes the same
losses as one that was never stopped, because all randomness of a step follows from the seed and the step's number.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from examples.dydi_lit.checkpoint import (
    CheckpointError,
    load_ema_weights,
    plain_errors,
    read_config,
    read_losses,
    save_checkpoint,
)
from examples.dydi_lit.data import NUM_CLASSES, digits
from examples.dydi_lit.figures import save_loss_curve
from examples.dydi_lit.model import DyDiLiT, config_of_size

NOISE_SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2}


@dataclass(frozen=True)
class TrainConfig:
    """Train a DyDi-LiT on the digits that ship with scikit-learn."""

    size: Literal["tiny", "S", "B", "L"] = "tiny"
    """The network; "tiny" is made for these digits and a CPU."""
    output: Path = Path("runs/train")
    """Folder that receives checkpoint/ and loss.png."""
    steps: int = 1500
    """Optimiser steps of the whole run, those before a resume included."""
    batch_size: int = 64
    """Images per step and process."""
    learning_rate: float = 3e-3
    """AdamW's learning rate after the warm-up."""
    schedule: Literal["constant_with_warmup", "cosine"] = "cosine"
    """What the learning rate does after the warm-up; "cosine" falls to zero at the last step."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient over all parameters."""
    ema_decay: float = 0.995
    """Decay per step of the averaged weights, which are the ones to sample from."""
    label_dropout: float = 0.1
    """Share of labels replaced by the null class, for classifier-free guidance."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Data type of the matrix products."""
    seed: int = 0
    """Seed of weights, data order, noise and label dropout."""
    save_every: int = 500
    """Steps between checkpoints; one is also written at the end and on Ctrl-C."""
    resume: Path | None = None
    """Checkpoint to continue; its configuration becomes the default of every other option."""


class Interrupted(KeyboardInterrupt):
    """Training ended early, on a signal; `checkpoint` is where it can be resumed."""

    def __init__(self, checkpoint: Path, steps_done: int) -> None:
        super().__init__(f"interrupted after step {steps_done}")
        self.checkpoint = checkpoint


def train(config: TrainConfig) -> Path:
    """Trains to `config.steps` and returns the checkpoint's folder.

    Raises Interrupted, after saving, on SIGINT or SIGTERM, and CheckpointError where `config.resume` does not fit.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
        step_scheduler_with_optimizer=False,  # one step of the schedule per optimiser step, on any number of processes
    )
    set_seed(config.seed)
    model_config = replace(config_of_size(config.size), in_channels=1, num_classes=NUM_CLASSES)
    model = DyDiLiT(model_config)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)).to(accelerator.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    rates = get_scheduler(
        config.schedule, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.steps
    )
    loader = DataLoader(digits("train"), config.batch_size, shuffle=True)
    model, optimizer, rates, loader = accelerator.prepare(model, optimizer, rates, loader)

    losses = restore(config.resume, config.size, accelerator, ema) if config.resume else []
    checkpoint = config.output / "checkpoint"

    def save() -> None:
        recorded = {"model": asdict(model_config), "train": to_json(config)}
        save_checkpoint(checkpoint, accelerator, ema.module, recorded, losses)

    noise_schedule = DDPMScheduler(**NOISE_SCHEDULE)
    model.train()
    progress = tqdm(
        total=config.steps, initial=len(losses), unit="step", desc="train", disable=not accelerator.is_main_process
    )
    with progress, call_on_signal(accelerator.set_trigger):
        for images, labels in batches_from(len(losses), config.steps, loader, accelerator):
            generator = generator_of_step(config.seed, len(losses), accelerator)
            with accelerator.autocast():
                loss = noise_loss(model, noise_schedule, images, labels, config.label_dropout, generator)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), config.gradient_clip)
            optimizer.step()
            optimizer.zero_grad()
            rates.step()
            ema.update_parameters(accelerator.unwrap_model(model))

            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            progress.update()
            progress.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}", refresh=False)
            if accelerator.check_trigger():
                save()
                raise Interrupted(checkpoint, len(losses))
            if len(losses) % config.save_every == 0 and len(losses) < config.steps:
                save()
    save()
    if accelerator.is_main_process:
        save_loss_curve(losses, config.output / "loss.png")
    return checkpoint


def noise_loss(
    model: nn.Module,
    noise_schedule: DDPMScheduler,
    images: Tensor,
    labels: Tensor,
    label_dropout: float,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the predicted noise, a scalar in float32.

    Images (B, C, height, width) in -1..1, labels (B,) int64. Each image gets its own time step and noise, and loses its
    label with probability `label_dropout`; all of it is drawn from `generator`, on the images' device.
    """
    draw: dict[str, Any] = {"generator": generator, "device": images.device}
    noise = torch.randn(images.shape, **draw)
    timesteps = torch.randint(noise_schedule.config["num_train_timesteps"], labels.shape, **draw)
    dropped = torch.rand(labels.shape, **draw) < label_dropout
    labels = labels.masked_fill(dropped, NUM_CLASSES)
    noisy = noise_schedule.add_noise(images, noise, timesteps)  # type: ignore[arg-type]  # asks for int32
    return nn.functional.mse_loss(model(noisy, timesteps, labels).float(), noise)


def batches_from(
    start: int, stop: int, loader: DataLoader, accelerator: Accelerator
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of steps start..stop-1, epoch after epoch; the order within an epoch follows from its number."""
    step = start
    while step < stop:
        epoch, done = divmod(step, len(loader))
        loader.set_epoch(epoch)  # type: ignore[attr-defined]  # accelerate's, which shuffles by seed and epoch
        for images, labels in accelerator.skip_first_batches(loader, done):
            yield images, labels
            step += 1
            if step == stop:
                return


def generator_of_step(seed: int, step: int, accelerator: Accelerator) -> torch.Generator:
    """A generator that depends on nothing but the seed, the step and the process: resuming has no state to restore."""
    words = np.random.SeedSequence((seed, step, accelerator.process_index)).generate_state(1, np.uint64)
    return torch.Generator(accelerator.device).manual_seed(int(words[0] >> np.uint64(1)))


@contextmanager
def call_on_signal(react: Callable[[], Any]) -> Iterator[None]:
    """Calls `react` at the first SIGINT or SIGTERM, so that a step is never cut in two; a second one acts at once."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore_handlers() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: object) -> None:
        restore_handlers()
        react()

    for number in previous:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        restore_handlers()


def restore(folder: Path, size: str, accelerator: Accelerator, ema: AveragedModel) -> list[float]:
    """Puts the weights, averages and optimiser of a checkpoint in place and returns the losses up to there."""
    saved_size = read_config(folder)["train"]["size"]
    if saved_size != size:
        raise CheckpointError(f"{folder} holds a model of size {saved_size!r}, not {size!r}")
    if not (folder / "state").is_dir():
        raise CheckpointError(f"cannot resume from {folder}: there is no {folder / 'state'}")
    losses = read_losses(folder)
    load_ema_weights(folder, ema.module)
    ema.n_averaged.fill_(len(losses))
    accelerator.load_state(str(folder / "state"))
    return losses


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration in JSON's types, without `resume`, which belongs to one start and not to the run."""
    fields = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    del fields["resume"]
    return fields


def from_json(fields: dict[str, Any]) -> TrainConfig:
    """The inverse of `to_json`."""
    return TrainConfig(**{**fields, "output": Path(fields["output"])})


def main() -> None:
    config = tyro.cli(TrainConfig, prog="python -m examples.dydi_lit.train")
    with plain_errors():
        if config.resume:  # parse again, now with the checkpoint's configuration in place of the defaults
            defaults = from_json(read_config(config.resume)["train"])
            config = tyro.cli(TrainConfig, default=defaults, prog="python -m examples.dydi_lit.train")
        try:
            checkpoint = train(config)
        except Interrupted as stop:
            command = f"python -m examples.dydi_lit.train --resume {stop.checkpoint}"
            raise SystemExit(f"{stop}; resume with: {command}") from None
    print(f"wrote {checkpoint} and {config.output / 'loss.png'}")


if __name__ == "__main__":
    main()
