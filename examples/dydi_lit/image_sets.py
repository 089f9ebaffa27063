"""Images to evaluate, wherever they are: in an .npz as OpenAI's ADM evaluator reads it, in a folder, or the digits."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from examples.dydi_lit.data import DataError, digits, find_images, read_image, to_uint8

DIGITS = {"digits": "train", "digits-held-out": "held-out"}
"""Words that stand for digits, in place of a file or folder, and the part that they name."""


@dataclass(frozen=True)
class ImageSet:
    """Images of one size; `read(start, stop)` gives those numbers as (stop - start, *shape) uint8."""

    name: str
    count: int
    shape: tuple[int, int, int]
    """Channels (1 or 3), height, width."""
    read: Callable[[int, int], Tensor]


def open_images(source: str, image_size: int | None = None) -> ImageSet:
    """The images of an .npz, a folder, or `digits`; DataError where it is none, or they are not of one size."""
    if source in DIGITS:
        return images_of(source, to_uint8(digits(DIGITS[source]).tensors[0]))  # type: ignore[arg-type]  # a literal
    path = Path(source)
    if path.is_dir():
        return _of_folder(path, image_size)
    return images_of(source, _load(path, "arr_0")[0])


def load_labelled(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, height, width, channels) uint8 and labels (n,) of an .npz that `generate` wrote; DataError."""
    images, labels = _load(file, "arr_0", "arr_1")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(
            f"arr_1 of {file} is {labels.dtype} {labels.shape}; expected {len(images)} integers, a label for each image"
        )
    return images, labels


def _load(file: Path, *names: str) -> list[np.ndarray]:
    """Arrays of an .npz, of which the first holds images; DataError where it does not."""
    try:
        stored = np.load(file)
        arrays = [stored[name] for name in names]
    except FileNotFoundError:
        raise DataError(f"no images at {file}: expected an .npz, a folder of images, or digits") from None
    except (OSError, ValueError, KeyError, IndexError, EOFError, BadZipFile, zlib.error) as error:
        raise DataError(f"cannot read {file} as an .npz with an {' and an '.join(names)}: {error}") from None
    images = arrays[0]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape[1:]:
        raise DataError(
            f"arr_0 of {file} is {images.dtype} {images.shape}; expected uint8 (n, height, width, channels), with 1 or "
            "3 channels"
        )
    return arrays


def images_of(name: str, array: np.ndarray) -> ImageSet:
    """The images (n, height, width, channels) uint8 of an array."""

    def read(start: int, stop: int) -> Tensor:
        return torch.from_numpy(array[start:stop]).permute(0, 3, 1, 2).contiguous()

    count, height, width, channels = array.shape
    return ImageSet(name, count, (channels, height, width), read)


def _of_folder(folder: Path, image_size: int | None) -> ImageSet:
    files = [folder / name for name in find_images(folder)]
    if not files:
        raise DataError(f"no images in {folder}")
    shape = read_image(files[0], image_size).shape

    def read_one(file: Path) -> Tensor:
        image = read_image(file, image_size)
        if image.shape != shape:
            raise DataError(
                f"{file} has (channels, height, width) {tuple(image.shape)}, but {files[0]} has {tuple(shape)}; "
                "--image-size brings them to one size"
            )
        return image

    def read(start: int, stop: int) -> Tensor:
        with ThreadPool() as pool:  # threads, because Pillow decodes without the interpreter's lock
            return torch.stack(pool.map(read_one, files[start:stop]))

    return ImageSet(str(folder), len(files), (shape[0], shape[1], shape[2]), read)


def as_grey(images: ImageSet) -> ImageSet:
    """Grey images stored with three equal channels, as with one; DataError on reading one that is coloured."""

    def read(start: int, stop: int) -> Tensor:
        batch = images.read(start, stop)
        if not torch.equal(batch, batch[:, :1].expand_as(batch)):
            raise DataError(f"{images.name} has coloured images, which cannot be compared with grey ones")
        return batch[:, :1]

    return replace(images, shape=(1, *images.shape[1:]), read=read)
