"""From a checkpoint to pictures: what `sample` and `generate` have in common."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from examples.dydi_lit.checkpoint import load_ema_model, read_training
from examples.dydi_lit.data import DataError
from examples.dydi_lit.diffusion import GuidedChannels, Sampler, check_sampling, sample
from examples.dydi_lit.extract_latents import load_vae
from examples.dydi_lit.parallel import processes

_DECODED_AT_ONCE = 8  # a decoder's activations are far larger than the transformer's


@dataclass(frozen=True)
class DrawConfig:
    """How to draw images from a checkpoint."""

    checkpoint: tyro.conf.Positional[Path]
    """Folder written by training."""
    guidance: float = 1.5
    """Scale of classifier-free guidance; 1 is none."""
    guided_channels: GuidedChannels = "all"
    """Channels that guidance acts on; "three" leaves the fourth channel of a latent alone, as DiT's code does."""
    sampler: Sampler = "ddim"
    """The paper's "ddpm", or "ddim" or "dpm-solver++", which make do with fewer steps."""
    steps: int = 30
    """Steps of the sampler, at most 1000."""
    seed: int = 0
    """Seed of the noise; image number i depends on the seed and i alone."""
    batch_size: int = 64
    """Images drawn at once, in each process."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Data type of the network's matrix products; the sampler and the VAE keep float32."""
    vae: str | None = None
    """AutoencoderKL that decodes latents, a local folder or a name on the Hugging Face hub; the one that encoded the
    training data unless given. Pixels need none."""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")


class Drawer:
    """Draws images from a checkpoint, on accelerate's default device.

    Raises CheckpointError where there is no checkpoint, DataError where there is no VAE for it, and ValueError where
    the model cannot be sampled as asked.
    """

    def __init__(self, config: DrawConfig) -> None:
        self.config = config
        self.training = read_training(config.checkpoint)
        self.data = self.training["data"]
        self.model = load_ema_model(config.checkpoint)
        self.device = processes().device
        self.options = {name: getattr(config, name) for name in ("sampler", "steps", "guidance", "guided_channels")}
        check_sampling(self.model, **self.options)
        self.vae = None
        if self.data["kind"] == "latents":
            name = config.vae or self.data["vae"]
            self.vae = load_vae(name).to(self.device)
            if (channels := self.vae.config["latent_channels"]) != self.data["channels"]:
                raise DataError(f"the VAE {name} has latents of {channels} channels, not of {self.data['channels']}")

    def __call__(self, labels: Tensor, seeds: Sequence[int], *, progress: bool = False) -> Tensor:
        """One picture for each label (n,) int64, with noise from its seed: (n, 1 or 3, height, width) in -1..1."""
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.config.mixed_precision)
        autocast = torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()
        with autocast:
            drawn = sample(
                self.model, labels, size=self.data["size"], seeds=seeds, clip=self.vae is None, progress=progress,
                **self.options,
            )  # fmt: skip
        return self.to_images(drawn)

    @torch.inference_mode()
    def to_images(self, drawn: Tensor) -> Tensor:
        """What the network draws (n, C, size, size) as pixels in -1..1: latents are decoded, pixels only cut."""
        if self.vae is not None:
            drawn = decode(self.vae, drawn, self.data["scaling_factor"])
        return drawn.clamp(-1, 1)


def decode(vae: Any, latents: Tensor, scaling_factor: float) -> Tensor:
    """Latents (n, C, size, size) as pixels (n, 3, height, width), about -1..1, in the dtype of the VAE."""
    parts = (latents / scaling_factor).to(vae.dtype).split(_DECODED_AT_ONCE)
    return torch.cat([vae.decode(part).sample for part in parts])
