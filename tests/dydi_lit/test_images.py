"""Pictures of any size, colour mode and depth as they are read."""

import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("examples.dydi_lit")

from examples.dydi_lit.data import DataError, read_image
from tests.dydi_lit.training import picture


@pytest.mark.parametrize("width, height, size", [(64, 64, 8), (100, 37, 9), (31, 200, 16), (5, 7, 12), (8, 8, 8)])
def test_centre_crop(tmp_path: Path, width: int, height: int, size: int) -> None:
    """A ramp from left to right and one from top to bottom keep their slope and their middle."""
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    ramps = np.stack([across - (width - 1) / 2, down - (height - 1) / 2, 0 * across], -1) * (200 / max(width, height))
    Image.fromarray((ramps + 128).round().astype(np.uint8)).save(tmp_path / "ramp.png")
    image = read_image(tmp_path / "ramp.png", size).double()
    assert image.shape == (3, size, size)
    slope = 200 / max(width, height) * min(width, height) / size
    middle = slice(2, -2)  # bicubic overshoots at the border
    offset = (torch.arange(size) - (size - 1) / 2)[middle] * slope + 128
    assert (image[0, middle, middle] - offset).abs().max() < 1 + slope  # crops are of whole pixels
    assert (image[1, middle, middle] - offset[:, None]).abs().max() < 1 + slope


@pytest.mark.parametrize("shape", [(1, 65000), (65001, 2)])
def test_a_line_is_not_scaled_to_gigabytes(
    tmp_path: Path, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its middle is shown, though never more is scaled than a strip of 16 squares."""
    ramp = np.arange(max(shape)) - (max(shape) - 1) / 2
    grey = np.broadcast_to((ramp * 8 + 128).clip(0, 255).round().astype(np.uint8), (min(shape), max(shape)))
    Image.fromarray(grey if shape[1] > shape[0] else grey.T).save(tmp_path / "line.png")
    resize, sizes = Image.Image.resize, []

    def watched(image: Image.Image, size: tuple[int, int], *arguments: Any, **options: Any) -> Image.Image:
        sizes.append(size)
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    image = read_image(tmp_path / "line.png", 64).double()
    assert image.shape == (3, 64, 64) and max(width * height for width, height in sizes) < 20 * 64 * 64
    along = image[0, 32] if shape[1] > shape[0] else image[0, :, 32]
    assert along.mean() == pytest.approx(128, abs=1) and (along.diff() >= 0).all()


@pytest.mark.parametrize(
    "mode, suffix",
    [("L", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("1", "png"), ("LA", "png")],
)
def test_any_colour_mode_becomes_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    original = picture(16, 16)
    original.convert(mode).save(tmp_path / f"picture.{suffix}")
    image = read_image(tmp_path / f"picture.{suffix}", None)
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8
    if mode in ("RGBA", "CMYK", "P"):
        difference = np.abs(np.asarray(original).astype(int) - image.permute(1, 2, 0).numpy())
        assert difference.mean() < (20 if mode == "P" else 4)


def test_transparency_and_sixteen_bits(tmp_path: Path) -> None:
    palette = picture(16, 16).convert("P")
    palette.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(tmp_path / "palette.png", None)
    assert np.array_equal(image.permute(1, 2, 0), palette.convert("RGB"))
    levels = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    assert np.array_equal(read_image(tmp_path / "deep.png", None)[1], levels // 256)


def tiff(samples: np.ndarray, white_is_zero: bool = False) -> bytes:
    """A TIFF of one row of grey samples, or packed 12 bit ones where their type is of bytes in threes."""
    kinds = {"u": 1, "i": 2, "f": 3}
    packed = samples.dtype == "V3"
    bits, kind = (12, 1) if packed else (8 * samples.itemsize, kinds[samples.dtype.kind])
    tags = {256: len(samples) * (2 if packed else 1), 257: 1, 258: bits, 259: 1, 262: 0 if white_is_zero else 1}
    tags |= {273: 8 + 2 + 12 * 10 + 4, 277: 1, 278: 1, 279: samples.nbytes, 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + samples.tobytes()


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"P5 4 1 65535\n" + np.array([0, 256, 32768, 65535], ">u2").tobytes(), [0, 1, 128, 255]),
        (b"P5 4 1 4095\n" + np.array([0, 16, 2048, 4095], ">u2").tobytes(), [0, 1, 128, 255]),
        (b"P2 4 1 1023\n0 4 512 1023\n", [0, 1, 128, 255]),
        (tiff(np.array([0, 256, 32768, 65535], "<u2")), [0, 1, 128, 255]),
        (tiff(np.array([65535, 32768, 0], "<u2"), white_is_zero=True), [0, 127, 255]),
        (tiff(np.array([b"\x00\x00\x10", b"\x80\x0f\xff"], "V3")), [0, 1, 128, 255]),
    ],
    ids=["16 bit PGM", "12 bit PGM", "10 bit PGM", "16 bit TIFF", "white is zero", "12 bit TIFF"],
)
def test_more_than_eight_bits_are_scaled(tmp_path: Path, content: bytes, expected: list[int]) -> None:
    (tmp_path / "deep.tiff").write_bytes(content)
    image = read_image(tmp_path / "deep.tiff", None)
    assert image[:, 0].tolist() == [expected] * 3


@pytest.mark.parametrize("dtype", ["<u4", "<i4", "<i2", "<i1", "<f4"])
def test_samples_without_a_known_range_are_refused(tmp_path: Path, dtype: str) -> None:
    (tmp_path / "picture.tiff").write_bytes(tiff(np.array([0, 1, 1], dtype)))
    with pytest.raises(DataError, match=r"picture\.tiff: ValueError: samples .* no known range: store 8 or 16 bits"):
        read_image(tmp_path / "picture.tiff", None)


def test_exif_orientation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    picture(16, 8).save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png", None).shape == (3, 8, 16)
