"""Latents of an image folder on disk, and the training data they make.

A folder of latents holds `index.json` (the fields of `LatentIndex`) and shards, `shard-00000.safetensors` and so on.
Shard s holds the images s * shard_size and following of the image folder, less those that could not be read:

- `moments` (n, orientations, 2, channels, size, size) float16: mean and standard deviation of the VAE's posterior, of
  the image and, where orientations is 2, of its mirror image (the VAE does not map one onto the other's mirror image)
- `labels` (n,) int64
- metadata `files`: a JSON list of the n files' names, relative to the image folder
"""

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from examples.dydi_lit.configs import check_types
from examples.dydi_lit.data import Corrupt, DataError, DataKind, ImageData


@dataclass(frozen=True)
class LatentIndex:
    """What all shards of a folder have in common, known before the first of them is written."""

    vae: str
    """Name or folder of the VAE, and the SHA-256 of its weights."""
    vae_sha256: str
    scaling_factor: float
    """What a latent is multiplied by to be of about unit variance."""
    image_size: int
    """Height and width of the images, in pixels."""
    channels: int
    size: int
    """Channels of a latent; its height and width."""
    orientations: int
    """2 where the mirror image is stored too, else 1."""
    class_names: list[str]
    num_files: int
    """Image files there were, readable or not, and the SHA-256 of their names."""
    files_sha256: str
    shard_size: int
    """Image files per shard."""

    @property
    def num_shards(self) -> int:
        return -(-self.num_files // self.shard_size)

    def files_of(self, shard: int) -> range:
        """Numbers of the image files that belong in a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_files))


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05}.safetensors"


def save_index(folder: Path, index: LatentIndex) -> None:
    """Writes index.json, whole or not at all."""
    partial = folder / "index.json.partial"
    partial.write_text(json.dumps(asdict(index), indent=2) + "\n")
    partial.replace(folder / "index.json")


def read_index(folder: Path) -> LatentIndex:
    """Reads index.json; DataError where it is missing or not one."""
    file = folder / "index.json"
    try:
        index = LatentIndex(**json.loads(file.read_text()))
        check_index(index)
        return index
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"no latents at {folder}: there is no {file}; python -m examples.dydi_lit.extract_latents writes one"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file} is not an index of latents: {error}") from None


def check_index(index: LatentIndex) -> None:
    """ValueError names a field that no run of extract_latents writes."""
    check_types(index)
    for name in ("image_size", "channels", "size", "shard_size"):
        if getattr(index, name) < 1:
            raise ValueError(f"{name} must be at least 1; got {getattr(index, name)}")
    if index.orientations not in (1, 2):
        raise ValueError(f"orientations must be 1 or 2; got {index.orientations}")


def save_shard(file: Path, moments: Tensor, labels: Tensor, files: list[str]) -> None:
    """Writes a shard under a temporary name, then renames it: a shard is there whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    # A single key of metadata, because safetensors does not fix the order of several: the bytes are to be the same.
    # save_file has temporary names of its own, which a killed process leaves behind.
    partial.write_bytes(save({"moments": moments, "labels": labels}, {"files": json.dumps(files)}))
    partial.replace(file)


def read_labels(file: Path, index: LatentIndex) -> Tensor:
    """Checks a shard's header, size and labels, but not its moments; returns the labels (n,) int64, or DataError."""
    try:
        with safe_open(str(file), "pt") as shard:
            moments, labels = shard.get_slice("moments"), shard.get_tensor("labels")
            shape, dtype = moments.get_shape(), moments.get_dtype()
    except FileNotFoundError:
        raise DataError(f"{file} is missing") from None
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} is damaged: {error}") from None
    expected = [len(labels), index.orientations, 2, index.channels, index.size, index.size]
    if shape != expected or dtype != "F16":
        raise DataError(f"{file} does not fit its index: moments are {dtype} {shape}, expected F16 {expected}")
    if labels.dtype != torch.int64 or labels.dim() != 1 or ((labels < 0) | (labels >= len(index.class_names))).any():
        raise DataError(f"{file} has labels outside the {len(index.class_names)} classes of its index")
    return labels


class LatentData(ImageData):
    """Latents written by `extract_latents`; an item is the moments (orientations, 2, channels, size, size) float16.

    Every shard's header and size are checked at the start: those missing or damaged are named in one warning and left
    out ("skip"), or refused ("refuse"). Shards are memory-mapped by each worker when it first needs them. Raises
    DataError.
    """

    kind: DataKind = "latents"
    takes_noise = True

    def __init__(self, folder: Path, image_size: int | None = None, corrupt: Corrupt = "skip") -> None:
        index = read_index(folder)
        if image_size not in (None, index.image_size):
            raise DataError(f"the latents in {folder} are of {index.image_size} pixel images, not {image_size}")
        self.channels, self.size, self.class_names = index.channels, index.size, index.class_names
        self.scaling_factor, self.vae, self.image_size = index.scaling_factor, index.vae, index.image_size
        self.mirrored = index.orientations == 2
        self._files: list[Path] = []
        labels, faults = [torch.empty(0, dtype=torch.int64)], []
        for shard in range(index.num_shards):
            file = shard_file(folder, shard)
            try:
                labels.append(read_labels(file, index))
                self._files.append(file)
            except DataError as error:
                faults.append(str(error))
        if faults:
            message = f"{len(faults)} of {index.num_shards} shards cannot be used: {'; '.join(faults)}"
            if corrupt == "refuse" or not self._files:
                raise DataError(f"{message}; run extract_latents again to write them anew")
            warnings.warn(f"{message}; training goes on without them", stacklevel=2)
        self.labels = torch.cat(labels)
        if not len(self):
            raise DataError(f"the latents in {folder} are of no images at all")
        self._ends = np.cumsum([len(part) for part in labels[1:]])
        self._moments: dict[int, Any] = {}
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_moments": {}}  # open shards stay in the process that opened them

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = range(len(self))[index]
        shard = int(np.searchsorted(self._ends, index, side="right"))
        if shard not in self._moments:
            self._moments[shard] = safe_open(str(self._files[shard]), "pt").get_slice("moments")
        moments = self._moments[shard]
        return moments[index - int(self._ends[shard]) + moments.get_shape()[0]], int(self.labels[index])

    def to_images(self, batch: Tensor, flip: Tensor, noise: Tensor) -> Tensor:
        """A sample of each posterior, scaled: (mean + std noise) scaling_factor.

        Where the latents hold no mirror images, flip is left out of account, with one warning.
        """
        if not self.mirrored:
            if not self._warned and flip.any():
                self._warned = True
                warnings.warn("these latents hold no mirror images: nothing is mirrored in training", stacklevel=2)
            flip = torch.zeros_like(flip)
        chosen = batch[torch.arange(len(batch), device=batch.device), flip.long()]
        mean, std = chosen.float().unbind(1)
        return (mean + std * noise) * self.scaling_factor

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), **{name: getattr(self, name) for name in ("scaling_factor", "vae", "image_size")}}
