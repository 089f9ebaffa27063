"""The options of a training run: what they are, what they must be, and which of them a resumed run may change."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from examples.dydi_lit.checkpoint import CheckpointError
from examples.dydi_lit.configs import Model, Size, check_types
from examples.dydi_lit.data import Corrupt, DataKind
from examples.dydi_lit.parallel import Parallel


@dataclass(frozen=True)
class TrainConfig:
    """Train DyDi-LiT or a rival; the defaults train a tiny DyDi-LiT on digits, in minutes on a CPU."""

    model: Model = "dydi-lit"
    """The network, by its row in the paper's tables."""
    size: Size = "tiny"
    """Its size; "tiny" is made for the digits and a CPU."""
    data: DataKind = "digits"
    """The digits of scikit-learn, a folder of images, latents that extract_latents wrote, or textures with twins."""
    data_path: Path | None = None
    """Folder of the images or latents."""
    image_size: int | None = None
    """Pixels that images are cropped to; digits and latents have their own size."""
    classes: Path | None = None
    """Text file that names the class folders to take of the images, one to a line; all of them by default."""
    corrupt: Corrupt = "skip"
    """An image that cannot be read is replaced by the next, with a warning, or refused before the run begins."""
    output: Path = Path("runs/train")
    """Folder that receives checkpoint/, tensorboard/ and loss.png."""

    steps: int = 1500
    """Optimiser steps of the whole run, those before a resume included."""
    batch_size: int = 64
    """Images of an optimiser step, over all processes and accumulated parts."""
    accumulate: int = 1
    """Parts that each process computes its images of a step in, one after the other; more need less memory."""
    learning_rate: float = 3e-3
    """AdamW's learning rate after the warm-up."""
    schedule: Literal["constant", "constant_with_warmup", "cosine"] = "cosine"
    """What the learning rate does: stay from the start, or after the warm-up stay or fall to zero at the last step."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises from zero; "constant" has none."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    gradient_clip: float | None = 1.0
    """Largest norm of the gradient over all parameters; None leaves it as it is."""
    ema_decay: float = 0.995
    """Decay per step of the averaged weights, which are the ones to sample from."""
    label_dropout: float = 0.1
    """Share of labels replaced by the null class, for classifier-free guidance."""
    learn_sigma: bool = True
    """Learn the variance beside the noise, with the hybrid loss of DiT; the loss is then mse + variational bound."""
    flip: bool = True
    """Mirror every other image, by chance; digits are never mirrored."""
    seed: int = 0
    """Seed of weights, data order, noise, flips and label dropout."""

    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Data type of the matrix products; weights and sums stay in float32."""
    parallel: Parallel = "ddp"
    """On many processes: the whole network on each ("ddp"), or weights and optimiser sharded over them ("fsdp2")."""
    gradient_checkpointing: bool = False
    """Compute each block again in the backward pass instead of keeping what it computed: slower, in less memory."""
    num_workers: int = 0
    """Processes that load images ahead of time, for each training process; 0 loads them in between."""
    save_every: int = 500
    """Steps between checkpoints; one is also written at the end and on Ctrl-C, in place of the one before."""
    archive_every: int | None = None
    """Steps between checkpoints that are kept as well, as checkpoint-0050000 and so on; a multiple of save_every."""
    log_every: int = 10
    """Steps between entries of the log; in between, neither the bar moves nor is Ctrl-C heeded."""
    progress: bool = True
    """Show a progress bar."""
    resume: Path | None = None
    """Checkpoint to continue; its configuration becomes the default of every other option."""


FREE_ON_RESUME = frozenset(
    {
        "data_path", "classes", "corrupt", "output", "steps", "accumulate", "mixed_precision", "parallel",
        "gradient_checkpointing", "num_workers", "save_every", "archive_every", "log_every", "progress",
        "resume",
    }
)  # fmt: skip
"""What may differ from the run that is resumed; anything else would make it another run."""


class SettingsError(Exception):
    """Options that do not fit together, the data or the number of processes."""


def check_settings(config: TrainConfig) -> None:
    """SettingsError names the option that is out of its range."""
    at_least = {"steps": 1, "batch_size": 1, "accumulate": 1, "save_every": 1, "log_every": 1}
    at_least |= {"warmup_steps": 0, "num_workers": 0, "seed": 0}
    for name, smallest in at_least.items():
        if getattr(config, name) < smallest:
            raise SettingsError(f"{name} must be at least {smallest}; got {getattr(config, name)}")
    for name in ("ema_decay", "label_dropout"):
        if not 0 <= getattr(config, name) <= 1:
            raise SettingsError(f"{name} must be in 0..1; got {getattr(config, name)}")
    if not config.learning_rate > 0:
        raise SettingsError(f"learning_rate must be positive; got {config.learning_rate}")
    if not config.weight_decay >= 0:
        raise SettingsError(f"weight_decay must not be negative; got {config.weight_decay}")
    if config.gradient_clip is not None and not config.gradient_clip > 0:
        raise SettingsError(f"gradient_clip must be positive, or None for no clipping; got {config.gradient_clip}")
    if config.archive_every is not None and (config.archive_every < 1 or config.archive_every % config.save_every):
        raise SettingsError(
            f"archive_every must be a multiple of save_every, {config.save_every}; got {config.archive_every}"
        )


def refuse_changes(folder: Path, saved: dict[str, Any], config: TrainConfig) -> None:
    """CheckpointError where `config` differs from the saved one, of `folder`, in more than FREE_ON_RESUME."""
    wanted = to_json(config)
    for name in wanted.keys() - FREE_ON_RESUME:
        if name not in saved or saved[name] != wanted[name]:
            raise CheckpointError(
                f"{folder} was trained with {name} = {saved.get(name)}, not {wanted[name]}: "
                f"leave --{name.replace('_', '-')} out to resume it, or start a new run"
            )


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration in JSON's types, without `resume`, which belongs to one start and not to the run."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    del values["resume"]
    return values


def from_json(values: dict[str, Any]) -> TrainConfig:
    """The inverse of `to_json`; CheckpointError where the values are not those of a configuration."""
    try:
        names = ("data_path", "classes", "output")
        config = TrainConfig(**values | {name: Path(values[name]) for name in names if values.get(name) is not None})
        check_types(config)
        return config
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"not the configuration of a training run: {error}") from None
