"""Where training images come from: scikit-learn's digits, a folder of images or latents of them, or drawn textures.

`open_data` returns one of them as an `ImageData`, a dataset with workers and pickling in mind: what it loads is small
(uint8 pixels, or float16 latents), and `to_images` makes the network's input of a whole batch, on the batch's device.
"""

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image, TiffImagePlugin
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, get_worker_info
from tqdm import tqdm

DataKind = Literal["digits", "images", "latents", "twins"]
Corrupt = Literal["skip", "refuse"]

IMAGE_SIZE = 8
"""Pixels of a digit, across and down."""
NUM_CLASSES = 10
_LARGEST_PIXEL = 16
_HELD_OUT_SHARE = 0.2
_SPLIT_SEED = 0  # fixed: every run, whatever its own seed, is scored on the same held-out digits
_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_SCALED_TO_16_BITS = {"PNG", "PPM"}  # formats whose samples of more than 8 bits Pillow scales to 16, in mode "I"
_LONGEST = 16  # longer side over the shorter one, in what is scaled to a square
_LAYOUT = "expected one sub-folder per class with images in it, as in ImageNet: FOLDER/n01440764/n01440764_18.JPEG"


class DataError(Exception):
    """Data that is missing, not laid out as expected, or damaged; the message names the file or folder."""


class ImageData(Dataset[tuple[Tensor, int]], ABC):
    """Labelled images; item i is (what is stored of image i, its label), to be batched by a DataLoader."""

    kind: DataKind
    channels: int
    """Channels of what the network sees."""
    size: int
    """Height and width of what the network sees."""
    class_names: list[str]
    """Name of each label."""
    network: ClassVar[Mapping[str, Any]] = {}
    """Fields of `ModelConfig` that networks for these images have in place of those of their size."""
    takes_noise = False
    """Whether `to_images` has a use for noise; where not, it may be empty."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...

    @abstractmethod
    def to_images(self, batch: Tensor, flip: Tensor, noise: Tensor) -> Tensor:
        """The network's input (B, channels, size, size) float32 of a batch of loaded items, on the batch's device.

        flip (B,) bool mirrors an image left to right; noise is standard normal, float32, of the result's shape.
        """

    def warn(self) -> None:
        """Warns of what was found unreadable since the last call, by any worker; it is for their parent to call."""

    def describe(self) -> dict[str, Any]:
        """What a checkpoint records of its data, in JSON's types; other data, or more or fewer images, differ in it."""
        names = ("kind", "channels", "size", "num_classes", "class_names")
        return {**{name: getattr(self, name) for name in names}, "num_images": len(self)}


def open_data(
    kind: DataKind, path: Path | None, image_size: int | None, corrupt: Corrupt = "skip", classes: Path | None = None
) -> ImageData:
    """The training images of a kind.

    - "digits": scikit-learn's, to train on; no path. image_size is None or 8.
    - "images": folder `path` with one sub-folder per class, cropped and scaled to image_size. `classes` is a text file
      naming the sub-folders to take, one to a line, such as Sub-IN's 100 of ImageNet's 1000; None takes all.
    - "twins": textures that occur twice, drawn by :mod:`examples.dydi_lit.twins`; no path, image_size is None.
    - "latents": folder written by `extract_latents`; image_size in pixels is None or the one it was written at.

    A file that cannot be read is replaced by the next one that can, with a warning that names it ("skip"), or all of
    them are looked for now and listed in the error ("refuse"). Raises DataError.
    """
    if kind == "digits":
        if path is not None:
            raise DataError(f"the digits come with scikit-learn and have no path; got {path}")
        if image_size not in (None, IMAGE_SIZE):
            raise DataError(f"the digits are {IMAGE_SIZE} pixels wide; got an image size of {image_size}")
    elif kind == "twins":
        if path is not None or image_size is not None:
            raise DataError(f"twins are drawn, without a path or an image size; got {path} and {image_size}")
    elif kind not in ("images", "latents"):
        raise DataError(f"unknown kind of data {kind!r}: choose digits, images, latents or twins")
    elif path is None:
        raise DataError(f"{kind} need the path of their folder")
    if classes is not None and kind != "images":
        raise DataError(f"classes can be chosen from an image folder only, not from {kind}; got {classes}")

    if kind == "digits":
        return DigitData()
    if kind == "twins":
        from examples.dydi_lit.twins import TwinData  # which imports this module

        return TwinData()
    assert path is not None
    if kind == "latents":
        from examples.dydi_lit.latents import LatentData  # which imports this module

        return LatentData(path, image_size, corrupt)
    if image_size is None:
        raise DataError("images need an image size to be cropped to, such as 256")
    return FolderData(path, image_size, corrupt, classes)


# --- digits: 1797 grey images of 8x8 pixels, read from disk without a download


def digits(split: Literal["train", "held-out"]) -> TensorDataset:
    """Images (n, 1, 8, 8) float32 in -1..1 and labels (n,) int64: 1437 to train on, 360 held out, classes balanced."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        np.arange(len(labels)), test_size=_HELD_OUT_SHARE, random_state=_SPLIT_SEED, stratify=labels
    )
    chosen = parts[0] if split == "train" else parts[1]
    images = torch.tensor(pixels[chosen], dtype=torch.float32).reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE)
    return TensorDataset(images / (_LARGEST_PIXEL / 2) - 1, torch.tensor(labels[chosen], dtype=torch.int64))


def to_pixels(images: Tensor) -> np.ndarray:
    """Images (n, 1, 8, 8) in -1..1 as rows (n, 64) float32 in scikit-learn's own range 0..16; values are clipped."""
    return ((images.clamp(-1, 1) + 1) * (_LARGEST_PIXEL / 2)).flatten(1).cpu().numpy()


class DigitData(ImageData):
    """The digits to train on, as float32 pixels in -1..1. They are never mirrored: a digit's mirror image is none."""

    kind: DataKind = "digits"
    channels = 1
    size = IMAGE_SIZE

    def __init__(self) -> None:
        self.class_names = [str(digit) for digit in range(NUM_CLASSES)]
        self.images, self.labels = digits("train").tensors

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def to_images(self, batch: Tensor, flip: Tensor, noise: Tensor) -> Tensor:
        return batch


# --- a folder of images


class FolderData(ImageData):
    """One sub-folder per class; labels follow the sorted names of the sub-folders. Items are (3, size, size) uint8.

    Files in folders below a class folder belong to the class; hidden files and other suffixes than an image's are
    passed over. Raises DataError where there are no classes, a class without images, a folder that links lead to twice,
    or, under "refuse", files that cannot be read.
    """

    kind: DataKind = "images"
    channels = 3

    def __init__(self, folder: Path, image_size: int, corrupt: Corrupt = "skip", classes: Path | None = None) -> None:
        if image_size < 1:
            raise DataError(f"the image size must be at least 1 pixel; got {image_size}")
        self.folder, self.size, self.corrupt = folder, image_size, corrupt
        self.class_names = _class_folders(folder, classes)
        seen = {(status.st_dev, status.st_ino): folder for status in [folder.stat()]}
        files = {name: find_images(folder / name, seen) for name in self.class_names}
        if empty := [name for name, found in files.items() if not found]:
            raise DataError(f"no images in these class folders of {folder}: {', '.join(empty)}; {_LAYOUT}")
        self.labels = np.repeat(np.arange(len(files)), [len(found) for found in files.values()])
        # Arrays rather than lists: a list of a million names is copied by every worker as its reference counts change.
        self._names = np.array([os.fsencode(f"{name}/{file}") for name, found in files.items() for file in found])
        self._unreadable = torch.zeros(len(self), dtype=torch.bool).share_memory_()  # what one worker found, all know
        self._warned = torch.zeros(len(self), dtype=torch.bool)
        if corrupt == "refuse":
            self._refuse_unreadable()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image and label `index`, or of the next image that can be read; DataError where there is none."""
        index = range(len(self))[index]
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            if not self._unreadable[candidate]:
                try:
                    return read_image(self.file(candidate), self.size), int(self.labels[candidate])
                except DataError:
                    if self.corrupt == "refuse":
                        raise
                    self._unreadable[candidate] = True
                    if get_worker_info() is None:
                        self.warn()
        raise DataError(f"none of the {len(self)} images in {self.folder} can be read")

    def warn(self) -> None:
        found = (self._unreadable & ~self._warned).nonzero().flatten().tolist()
        self._warned[found] = True
        for index in found:
            warnings.warn(f"{self._fault(index)}; the next image takes its place", stacklevel=3)

    def file(self, index: int) -> Path:
        """The file of image `index`."""
        return self.folder / self.name(index)

    def name(self, index: int) -> str:
        """The file of image `index`, relative to the folder, with slashes."""
        return os.fsdecode(self._names[index])

    def to_images(self, batch: Tensor, flip: Tensor, noise: Tensor) -> Tensor:
        images = batch.float() / 127.5 - 1
        return torch.where(flip[:, None, None, None], images.flip(-1), images)

    def _fault(self, index: int) -> str | None:
        """What is wrong with image `index`."""
        try:
            read_image(self.file(index), self.size)
        except DataError as error:
            return str(error)
        return None

    def _refuse_unreadable(self) -> None:
        with ThreadPool() as pool:  # threads, because Pillow decodes without the interpreter's lock
            checks = pool.imap(self._fault, range(len(self)), chunksize=64)
            faults = list(tqdm(checks, "check", len(self), unit="image"))
        if found := [text for text in faults if text]:
            raise DataError(f"{len(found)} of {len(self)} images cannot be read: {'; '.join(found)}")


def find_images(folder: Path, seen: dict[tuple[int, int], Path] | None = None) -> list[str]:
    """The image files in `folder` and below, by suffix, sorted: their names relative to it, with slashes.

    Links to folders are followed; hidden files and folders are left out. DataError where a folder cannot be read, or
    is met twice, by a link, which would count its images again: as one of `seen`, by device and inode, to which the
    folders met here are added.
    """
    found, seen = [], {} if seen is None else seen
    for root, folders, files in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        status = os.stat(root)
        if (first := seen.setdefault((status.st_dev, status.st_ino), Path(root))) != Path(root):
            raise DataError(f"{root} is a link to {first}, whose images would count twice: remove one of them")
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(root).relative_to(folder).as_posix()
        names = [name for name in files if os.path.splitext(name)[1].lower() in _SUFFIXES and not name.startswith(".")]
        found += names if below == "." else [f"{below}/{name}" for name in names]
    return sorted(found)


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"cannot read the folder {error.filename}: {error.strerror}")


def read_image(file: Path, size: int | None) -> Tensor:
    """The picture in `file` as (3, size, size) uint8, cropped and scaled; as (3, height, width) where size is None.

    Grey, palette, CMYK and transparent pictures become RGB, without alpha; of several frames the first one counts. Of
    samples of 9 to 16 bits the upper eight count; longer, signed and floating-point ones have no range that all agree
    on, and are refused. EXIF orientation is ignored, as by the pipelines that ImageNet's published figures come from.
    Raises DataError.
    """
    try:
        with Image.open(file) as stored:
            image = _to_rgb(stored)
        return torch.from_numpy(np.array(image if size is None else _centre_crop(image, size))).permute(2, 0, 1)
    except Exception as error:  # there is hardly an exception that Pillow's decoders do not raise on damaged files
        raise DataError(f"cannot read {file}: {type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    tags: Any = getattr(image, "tag_v2", {})  # of a TIFF
    signed = set(tags.get(TiffImagePlugin.SAMPLEFORMAT, ())) & {2, 3}  # 3 is floating point
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SCALED_TO_16_BITS):
        (bits, *_) = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))
        grey = np.asarray(image) >> (bits - 8)  # Pillow would clip instead
        if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero
            grey = 255 - grey
        image = Image.fromarray(grey.astype(np.uint8))
    elif signed or image.mode in ("I", "F"):
        raise ValueError(
            "samples that are signed, floating-point or of 32 bits have no known range: store 8 or 16 bits"
        )
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's and DiT's crop: halved while twice too large, scaled so that the shorter side fits, centre cut out.

    Of very long images the ends are cut off first, so that a line of one pixel is not scaled to gigabytes.
    """
    longest = _LONGEST * min(image.size)
    cut = [max(side - longest, 0) // 2 for side in image.size]  # as much at both ends, so that the middle stays
    image = image.crop((cut[0], cut[1], image.width - cut[0], image.height - cut[1]))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _class_folders(folder: Path, classes: Path | None) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; {_LAYOUT}")
    names = {entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")}
    if not names:
        raise DataError(f"no class folders in {folder}; {_LAYOUT}")
    if classes is None:
        return sorted(names)
    try:
        chosen = {line.strip() for line in classes.read_text("utf-8").splitlines()} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the list of classes {classes}: {error}") from None
    if not chosen:
        raise DataError(f"the list of classes {classes} is empty: expected the name of a sub-folder on each line")
    if missing := sorted(chosen - names):
        raise DataError(f"{classes} lists classes that are not in {folder}: {', '.join(missing)}")
    return sorted(chosen)


def to_uint8(images: Tensor) -> np.ndarray:
    """Pixel images (n, c, h, w) in -1..1 as (n, h, w, c) uint8, rounded to the nearest; values outside are clipped."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
