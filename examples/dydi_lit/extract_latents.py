"""Encodes a folder of images for training: python -m examples.dydi_lit.extract_latents IMAGES OUTPUT

Training then reads latents instead of running the VAE on every image of every epoch. What is stored is the posterior's
mean and standard deviation, so that training samples it anew each time, as DiT does. 256 pixel images take 33 kB each
with their mirror images: 42 GB for ImageNet, 4.2 GB for the paper's Sub-IN. Several processes share the work:

    accelerate launch -m examples.dydi_lit.extract_latents IMAGES OUTPUT
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from examples.dydi_lit.checkpoint import plain_errors
from examples.dydi_lit.data import Corrupt, DataError, FolderData, read_image
from examples.dydi_lit.latents import LatentIndex, read_index, read_labels, save_index, save_shard, shard_file
from examples.dydi_lit.parallel import processes


@dataclass(frozen=True)
class ExtractConfig:
    """Encode a folder of images with a VAE, once, into latents to train on.

    A run that was stopped goes on where it was when the same command is given again.
    """

    images: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IMAGES")]
    """Folder with one sub-folder of images per class, such as ImageNet's train/."""
    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUTPUT")]
    """Folder that receives index.json and the shards."""
    vae: str = "stabilityai/sd-vae-ft-ema"
    """AutoencoderKL of diffusers: a name on the Hugging Face hub, or a local folder."""
    image_size: int = 256
    """Pixels that images are scaled and cropped to; a latent is an eighth of it with Stable Diffusion's VAE."""
    flip: bool = True
    """Encode the mirror image of every image too, for training with horizontal flips."""
    classes: Path | None = None
    """Text file with the names of the class folders to take, one to a line; all of them without it."""
    corrupt: Corrupt = "skip"
    """Name images that cannot be read and leave them out, or look for them first and refuse to start."""
    batch_size: int = 16
    """Images encoded at once."""
    shard_size: int = 4096
    """Images per file; a run that was stopped loses at most one file's work per process."""
    workers: int = 4
    """Processes that decode images, per process that encodes; 0 decodes in the process itself."""

    def __post_init__(self) -> None:
        for name, least in (("image_size", 1), ("batch_size", 1), ("shard_size", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise DataError(f"{name} must be at least {least}; got {getattr(self, name)}")


class ImageFiles(Dataset[tuple[int, Tensor | str]]):
    """Item i is (i, image (3, size, size) uint8), or (i, what is wrong with the file)."""

    def __init__(self, data: FolderData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, read_image(self.data.file(index), self.data.size)
        except DataError as error:
            return index, str(error)


def extract(config: ExtractConfig) -> tuple[int, int]:
    """Writes the shards that are not there yet; returns the numbers of images encoded and left out, of all shards.

    Process p of P writes every P-th of them, from p on. A shard's bytes do not depend on the number of processes or on
    when the run was stopped. Raises DataError, also where the output holds latents of other settings.
    """
    state = processes()
    data = FolderData(config.images, config.image_size, config.corrupt, config.classes)
    vae = load_vae(config.vae).to(state.device)
    index = index_of(config, data, vae)
    prepare_folder(config.output, index, write=state.is_main_process)
    state.wait_for_everyone()

    missing = [shard for shard in range(index.num_shards) if not is_complete(config.output, shard, index)]
    mine = missing[state.process_index :: state.num_processes]
    state.wait_for_everyone()  # all have seen the same shards missing before one of them is written
    batches = {shard: _cut(index.files_of(shard), config.batch_size) for shard in mine}
    loader = DataLoader(
        ImageFiles(data),
        batch_sampler=[batch for shard in mine for batch in batches[shard]],
        num_workers=config.workers if mine else 0,
        collate_fn=_collate,
    )
    decoded = iter(loader)
    total = sum(len(index.files_of(shard)) for shard in mine)
    with tqdm(total=total, unit="image", desc="encode", disable=not state.is_main_process) as progress:
        for shard in mine:
            moments, labels, files = [], [], []
            for _ in batches[shard]:
                numbers, images, faults = next(decoded)
                for fault in faults:
                    warnings.warn(f"{fault}; left out", stacklevel=2)
                names = [data.name(number) for number in numbers]
                moments.append(encode(vae, images, index, names))
                labels += [int(data.labels[number]) for number in numbers]
                files += names
                progress.update(len(numbers) + len(faults))
            save_shard(shard_file(config.output, shard), torch.cat(moments), torch.tensor(labels).long(), files)
    state.wait_for_everyone()
    encoded = sum(len(read_labels(shard_file(config.output, shard), index)) for shard in range(index.num_shards))
    return encoded, index.num_files - encoded


@torch.inference_mode()
def encode(vae: AutoencoderKL, images: Tensor, index: LatentIndex, names: list[str]) -> Tensor:
    """Moments (n, orientations, 2, channels, size, size) float16, on the CPU, of n images (n, 3, h, w) uint8.

    DataError names an image whose moments are too large for float16, or not numbers.
    """
    if not names:
        return torch.empty(0, index.orientations, 2, index.channels, index.size, index.size, dtype=torch.float16)
    pixels = images.to(vae.device).float() / 127.5 - 1
    sides = []
    for side in (pixels, pixels.flip(-1))[: index.orientations]:
        posterior = vae.encode(side).latent_dist
        sides.append(torch.stack([posterior.mean, posterior.std], 1))
    moments = torch.stack(sides, 1).to("cpu", torch.float16)
    if not (finite := moments.isfinite().flatten(1).all(1)).all():
        raise DataError(f"the VAE's output for {names[int(finite.int().argmin())]} is not finite in float16")
    return moments


def load_vae(name: str) -> AutoencoderKL:
    """The VAE called `name`, to encode with in float32; DataError where there is none, or none that we can use."""
    try:
        vae = AutoencoderKL.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load the VAE {name}: {' '.join(str(error).split())}") from None
    if vae.config.get("shift_factor"):
        raise DataError(f"the VAE {name} shifts its latents; only VAEs that scale them and no more are supported")
    return vae.eval().requires_grad_(False)


def index_of(config: ExtractConfig, data: FolderData, vae: AutoencoderKL) -> LatentIndex:
    """The index of the latents that `config` asks for; DataError where the VAE cannot encode images of their size."""
    shrink = 2 ** (len(vae.config["block_out_channels"]) - 1)
    if config.image_size % shrink:
        raise DataError(f"image_size must be a multiple of {shrink} for this VAE; got {config.image_size}")
    weights = hashlib.sha256()
    for key, weight in sorted(vae.state_dict().items()):
        weights.update(key.encode())
        weights.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    names = "\n".join(data.name(number) for number in range(len(data)))
    return LatentIndex(
        vae=config.vae,
        vae_sha256=weights.hexdigest(),
        scaling_factor=float(vae.config["scaling_factor"]),
        image_size=config.image_size,
        channels=vae.config["latent_channels"],
        size=config.image_size // shrink,
        orientations=2 if config.flip else 1,
        class_names=data.class_names,
        num_files=len(data),
        files_sha256=hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest(),
        shard_size=config.shard_size,
    )


def prepare_folder(output: Path, index: LatentIndex, write: bool) -> None:
    """Puts the index in place, or checks that the one there is the same; DataError names what is not."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {output}: {error}") from None
    if (output / "index.json").exists():
        there, asked = asdict(read_index(output)), asdict(index)
        if different := [name for name in asked if there[name] != asked[name]]:
            raise DataError(
                f"{output} holds latents of other settings ({', '.join(different)} differ); "
                "give the same settings to go on with them, or another output"
            )
    elif write:
        save_index(output, index)


def is_complete(output: Path, shard: int, index: LatentIndex) -> bool:
    """Whether the shard is there, whole and of the index's shape."""
    try:
        read_labels(shard_file(output, shard), index)
    except DataError:
        return False
    return True


def _cut(numbers: Sequence[int], size: int) -> list[list[int]]:
    return [list(numbers[start : start + size]) for start in range(0, len(numbers), size)]


def _collate(items: list[tuple[int, Tensor | str]]) -> tuple[list[int], Tensor, list[str]]:
    """The numbers of the files that could be read, their images in one tensor, and what is wrong with the others."""
    images = {number: image for number, image in items if isinstance(image, Tensor)}
    faults = [fault for _, fault in items if isinstance(fault, str)]
    return list(images), torch.stack(list(images.values())) if images else torch.empty(0), faults


def main() -> None:
    with plain_errors():
        config = tyro.cli(ExtractConfig, prog="python -m examples.dydi_lit.extract_latents")
        try:
            encoded, left_out = extract(config)
        except KeyboardInterrupt:
            raise SystemExit("interrupted; the same command goes on with the shards that are missing") from None
    if processes().is_main_process:
        print(f"{config.output} holds the latents of {encoded} images; {left_out} could not be read and are left out")


if __name__ == "__main__":
    main()
