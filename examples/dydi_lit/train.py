"""Trains DyDi-LiT or a rival: python -m examples.dydi_lit.train --help

On many GPUs the same command is launched by `accelerate launch -m` or `torchrun -m`. Ctrl-C (or SIGTERM) ends the run
with a checkpoint. A run resumed from a checkpoint computes the same losses as one that was never stopped, because
everything random follows from the seed and the step's number.
"""

import math
import platform
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, set_seed
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dydila_kernels
from examples.dydi_lit.batches import Batch, RandomisedData, Share, StepSampler, load_batches
from examples.dydi_lit.checkpoint import (
    CheckpointError,
    State,
    first_not_finite,
    load_ema_model,
    plain_errors,
    read_losses,
    read_state,
    read_training,
    save_checkpoint,
)
from examples.dydi_lit.configs import ModelConfig, config_of
from examples.dydi_lit.configs import to_json as model_to_json
from examples.dydi_lit.data import ImageData, open_data
from examples.dydi_lit.diffusion import GaussianDiffusion, Losses
from examples.dydi_lit.model import DiffusionTransformer
from examples.dydi_lit.parallel import gather_moments, gather_weights, parallelise, processes, restore_moments, whole
from examples.dydi_lit.plots import save_loss_curve
from examples.dydi_lit.recorder import Diverged, Recorder, diverged
from examples.dydi_lit.settings import SettingsError, TrainConfig, check_settings, from_json, refuse_changes, to_json

_FOREIGN = {DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM}


class Interrupted(KeyboardInterrupt):
    """Training ended early, on a signal; `checkpoint` is where it can be resumed."""

    def __init__(self, checkpoint: Path, steps_done: int) -> None:
        super().__init__(f"interrupted after step {steps_done}")
        self.checkpoint = checkpoint


def train(config: TrainConfig) -> Path:
    """Trains to `config.steps` and returns the checkpoint's folder.

    Raises SettingsError, DataError, or CheckpointError where `config.resume` does not fit, all before any work is
    done; Interrupted, after saving, on SIGINT or SIGTERM; and Diverged, with the last checkpoint left as it was, where
    a loss, gradient or weight is not finite.
    """
    check_settings(config)
    accelerator = accelerator_of(config)
    share = share_of(config, accelerator)
    data = open_data(config.data, config.data_path, config.image_size, config.corrupt, config.classes)
    if config.batch_size > len(data):
        raise SettingsError(f"batch_size is {config.batch_size}, but there are {len(data)} images only")
    if config.resume:
        check_resume(config.resume, config, data)
    run = Run(config, data, accelerator)
    steps = range(len(run.losses), config.steps)

    sampler = StepSampler(len(data), share, config.seed, steps.start, steps.stop)
    batches = load_batches(
        RandomisedData(data, config.label_dropout, config.flip), sampler, config.num_workers, accelerator.device
    )
    diffusion = GaussianDiffusion(accelerator.device)
    recorder = Recorder(
        accelerator,
        run.losses,
        folder=config.output / "tensorboard",
        steps=config.steps,
        batch_size=config.batch_size,
        progress=config.progress,
    )
    with recorder, closing(batches), call_on_signal(accelerator.set_trigger):
        for done in range(steps.start + 1, steps.stop + 1):
            parts = []
            for part in range(1, config.accumulate + 1):
                with accelerator.no_sync(run.model) if part < config.accumulate else nullcontext():
                    with accelerator.autocast():
                        losses = batch_losses(run.model, diffusion, data, next(batches))
                    accelerator.backward((losses.total + run.network.balance()) / config.accumulate)
                parts.append(torch.stack(losses).detach())
            learning_rate = run.learning_rate
            gradient_norm = run.update()

            recorder.add(Losses(*torch.stack(parts).mean(0)), gradient_norm)
            save = done % config.save_every == 0 or done == config.steps
            if save or done % config.log_every == 0:
                recorder.flush(learning_rate)
                interrupted = accelerator.check_trigger() and done < config.steps
                if save or interrupted:
                    run.save()
                    recorder.restart_clock()
                if interrupted:
                    raise Interrupted(run.checkpoint, done)
    if accelerator.is_main_process:
        save_loss_curve(run.losses, config.output / "loss.png")
    return run.checkpoint


def batch_losses(model: nn.Module, diffusion: GaussianDiffusion, data: ImageData, batch: Batch) -> Losses:
    """The mean of each loss over the batch, scalars in float32."""
    images = data.to_images(batch.stored, batch.flip, batch.posterior_noise)
    noisy = diffusion.add_noise(images, batch.noise, batch.timesteps)
    output = model(noisy, batch.timesteps, batch.labels)
    return Losses(*(loss.mean() for loss in diffusion.losses(output, images, noisy, batch.noise, batch.timesteps)))


class Run:
    """All that changes from step to step, and that a checkpoint therefore holds."""

    def __init__(self, config: TrainConfig, data: ImageData, accelerator: Accelerator) -> None:
        self.config, self.data, self.accelerator = config, data, accelerator
        self.model_config = model_config_of(config, data)
        self.checkpoint = config.output / "checkpoint"
        self.losses: list[float] = []

        set_seed(config.seed)
        self.network = DiffusionTransformer(self.model_config).to(accelerator.device)
        self.network.gradient_checkpointing = config.gradient_checkpointing
        self.average = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        state = self._load(config.resume) if config.resume else None

        self.model = parallelise(self.network, self.average.module, config.parallel, accelerator)  # type: ignore[arg-type]
        self.parameters = [weight for weight in self.network.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.rates = get_scheduler(
            config.schedule, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.steps
        )
        self.optimizer = accelerator.prepare_optimizer(optimizer)  # scales the loss for fp16
        if state:
            check_state(state, self.network, self.rates)
            restore_moments(self.network, optimizer, state.moments)
            own = self.rates.state_dict()  # other versions of torch may have more
            self.rates.load_state_dict({n: value for n, value in state.counters["schedule"].items() if n in own})
            for group, rate in zip(optimizer.param_groups, self.rates.get_last_lr(), strict=True):
                group["lr"] = rate
            if accelerator.scaler and state.counters.get("loss_scale"):
                accelerator.scaler.load_state_dict(state.counters["loss_scale"])
        self.network.train()

    @property
    def learning_rate(self) -> float:
        """That of the next step."""
        return float(self.rates.get_last_lr()[0])

    def update(self) -> Tensor:
        """One step of optimiser, schedule and average, from the gradients; returns their norm before clipping."""
        limit = math.inf if self.config.gradient_clip is None else self.config.gradient_clip
        norm = whole(self.accelerator.clip_grad_norm_(self.parameters, limit))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rates.step()
        self.average.update_parameters(self.network)
        return norm

    def save(self) -> None:
        """Writes the checkpoint and, where it is due, a copy to keep; for all processes at once.

        Raises Diverged, before anything is written, where it would not be finite.
        """
        optimizer, scaler = self.optimizer.optimizer, self.accelerator.scaler
        averaged = gather_weights(self.average.module)
        counters = {"schedule": self.rates.state_dict(), "loss_scale": scaler.state_dict() if scaler else None}
        state = State(gather_weights(self.network), gather_moments(self.network, optimizer), counters)
        for kind, tensors in (("weights", state.weights), ("averages", averaged), ("moments", state.moments)):
            if name := first_not_finite(tensors):
                raise diverged(f"after step {len(self.losses)} the {kind} of {name} are not all finite")
        if self.accelerator.is_main_process:
            with torch.device("meta"):
                model = DiffusionTransformer(self.model_config)
            model.load_state_dict(averaged, assign=True)
            training = {
                "steps_done": len(self.losses),
                "train": to_json(self.config),
                "model": model_to_json(self.model_config),
                "data": self.data.describe(),
                "versions": versions(),
            }
            save_checkpoint(self.checkpoint, model, training, self.losses, state)
            if self.config.archive_every and len(self.losses) % self.config.archive_every == 0:
                archive = self.checkpoint.with_name(f"checkpoint-{len(self.losses):07d}")
                save_checkpoint(archive, model, training, self.losses, state)
        self.accelerator.wait_for_everyone()

    def _load(self, folder: Path) -> State:
        """Puts weights, averages and losses of a checkpoint in place; CheckpointError where they do not fit."""
        state, averaged = read_state(folder), load_ema_model(folder, fuse=False)
        try:
            self.network.load_state_dict(state.weights)
            self.average.module.load_state_dict(averaged.state_dict())
        except RuntimeError as error:
            raise CheckpointError(f"cannot resume: the weights in {folder} are of another network: {error}") from None
        self.losses = read_losses(folder)
        self.average.n_averaged.fill_(len(self.losses))
        return state


def accelerator_of(config: TrainConfig) -> Accelerator:
    """What accelerate finds: the processes and their devices; SettingsError where they cannot compute as asked."""
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            cpu=not torch.accelerator.is_available(),  # untold, it takes processes on CPUs for runs of their own
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the environment's would divide
        )
    except ValueError as error:
        raise SettingsError(f"mixed_precision = {config.mixed_precision}: {error}") from None
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would compute in float32
        raise SettingsError("mixed_precision = fp16 needs a GPU: choose bf16 or no")
    if accelerator.distributed_type in _FOREIGN:
        raise SettingsError(
            f"accelerate is configured for {accelerator.distributed_type.value}, which would take the place of "
            "parallel = ddp or fsdp2: switch it off, in its configuration file or environment"
        )
    return accelerator


def share_of(config: TrainConfig, accelerator: Accelerator) -> Share:
    """This process's share of each step; SettingsError unless the batch divides evenly."""
    processes = accelerator.num_processes
    if config.batch_size % (processes * config.accumulate):
        raise SettingsError(
            f"batch_size must divide by the number of processes times accumulate, {processes} x {config.accumulate}; "
            f"got {config.batch_size}"
        )
    return Share(config.batch_size, config.accumulate, processes, accelerator.process_index)


def check_resume(folder: Path, config: TrainConfig, data: ImageData) -> None:
    """CheckpointError unless the checkpoint in `folder` is of the same run, on the same data, and not beyond it."""
    training = read_training(folder)
    refuse_changes(folder, training["train"], config)
    described = data.describe()
    if differ := [name for name in described if training["data"].get(name) != described[name]]:
        raise CheckpointError(f"{folder} was trained on other data: these differ in {', '.join(differ)}")
    if training["steps_done"] > config.steps:
        raise CheckpointError(f"{folder} is at step {training['steps_done']}, beyond steps = {config.steps}")


def check_state(state: State, network: nn.Module, rates: LRScheduler) -> None:
    """CheckpointError unless the moments are of parameters of this network, and the counters of such a schedule."""
    shapes = {name: weight.shape for name, weight in network.named_parameters()}
    for name, moment in state.moments.items():
        shape = shapes.get(name.rpartition(".")[0])
        if shape is None or moment.shape not in (shape, torch.Size()):
            raise CheckpointError(f"cannot resume: no parameter has a moment {name} of shape {tuple(moment.shape)}")
    schedule, own = state.counters.get("schedule"), rates.state_dict()
    if not isinstance(schedule, dict) or any(
        name not in schedule or type(schedule[name]) is not type(own[name])
        for name in ("base_lrs", "last_epoch", "_last_lr")
    ):
        raise CheckpointError("cannot resume: the schedule was not saved with base_lrs, last_epoch and _last_lr")
    if not isinstance(state.counters.get("loss_scale"), dict | None):
        raise CheckpointError("cannot resume: the loss scale must have been saved as an object, or as null")


def model_config_of(config: TrainConfig, data: ImageData) -> ModelConfig:
    """The network for these data; SettingsError where its patches do not fit the images."""
    model_config = config_of(
        config.model,
        config.size,
        in_channels=data.channels,
        num_classes=data.num_classes,
        learn_sigma=config.learn_sigma,
        **data.network,
    )
    if data.size % model_config.patch_size:
        raise SettingsError(f"images of size {data.size} do not divide into patches of {model_config.patch_size}")
    return model_config


def versions() -> dict[str, str]:
    """The versions that numbers may depend on."""
    libraries = (dydila_kernels, torch, accelerate, diffusers, numpy)
    return {"python": platform.python_version()} | {library.__name__: library.__version__ for library in libraries}


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


def main() -> None:
    config = tyro.cli(TrainConfig, prog="python -m examples.dydi_lit.train")
    with plain_errors(SettingsError, Diverged):
        if config.resume:  # parse again, now with the checkpoint's configuration in place of the defaults
            defaults = from_json(read_training(config.resume)["train"])
            config = tyro.cli(TrainConfig, default=defaults, prog="python -m examples.dydi_lit.train")
        try:
            checkpoint = train(config)
        except Interrupted as stop:
            message = f"{stop}; resume with: python -m examples.dydi_lit.train --resume {stop.checkpoint}"
            raise SystemExit(message if processes().is_main_process else 1) from None
    if processes().is_main_process:
        print(f"wrote {checkpoint} and {config.output / 'loss.png'}")


if __name__ == "__main__":
    main()
