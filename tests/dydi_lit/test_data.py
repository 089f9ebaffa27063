"""Training images: the digits, and folders of images good and bad."""

import errno
import os
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

pytest.importorskip("examples.dydi_lit")

from examples.dydi_lit.batches import RandomisedData, Share, StepSampler, load_batches
from examples.dydi_lit.data import (
    DataError,
    FolderData,
    digits,
    find_images,
    open_data,
    to_pixels,
    to_uint8,
)
from tests.dydi_lit.training import picture


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes: two, three (one of them below a folder of its own) and one images, with other files in between."""
    sizes = [("cat/a.png", 20, 20), ("cat/b.JPEG", 41, 16), ("ant/1.jpg", 9, 70), ("ant/2.png", 8, 8)]
    for seed, (name, width, height) in enumerate([*sizes, ("ant/deep/0.png", 33, 32), ("dog/x.webp", 16, 24)]):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(width, height, seed).save(file)
    (tmp_path / "images" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "images" / "ant" / "._1.jpg").write_text("what a Mac leaves behind")
    (tmp_path / "images" / ".hidden").mkdir()
    return tmp_path / "images"


# --- digits


def test_digits_are_split_once_and_for_all() -> None:
    training, held_out = digits("train"), digits("held-out")
    assert (len(training), len(held_out)) == (1437, 360)
    images, labels = training.tensors
    assert images.shape[1:] == (1, 8, 8) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert (images.min(), images.max()) == (-1, 1)
    assert torch.equal(images, digits("train").tensors[0])
    assert not {image.tobytes() for image in to_pixels(images)} & {
        image.tobytes() for image in to_pixels(held_out.tensors[0])
    }


def test_digits_as_training_data() -> None:
    data = open_data("digits", None, None, "skip")
    images, labels = digits("train").tensors
    assert len(data) == 1437 and torch.equal(data[5][0], images[5]) and data[5][1] == labels[5]
    assert data.describe() == {
        "kind": "digits", "channels": 1, "size": 8, "num_classes": 10, "class_names": list("0123456789"),
        "num_images": 1437,
    }  # fmt: skip
    batch = images[:3]
    assert torch.equal(data.to_images(batch, torch.ones(3, dtype=torch.bool), torch.randn(3, 1, 8, 8)), batch)


# --- folders


def test_classes_follow_the_sorted_folders(folder: Path) -> None:
    data = FolderData(folder, 8)
    assert data.class_names == ["ant", "cat", "dog"] and data.num_classes == 3
    names = ["ant/1.jpg", "ant/2.png", "ant/deep/0.png", "cat/a.png", "cat/b.JPEG", "dog/x.webp"]
    assert [data.name(number) for number in range(len(data))] == names
    assert [data[number][1] for number in range(len(data))] == [0, 0, 0, 1, 1, 2]
    assert data.describe()["kind"] == "images" and data.describe()["size"] == 8
    images, labels = next(iter(DataLoader(data, batch_size=6)))
    assert images.shape == (6, 3, 8, 8) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert torch.equal(data[-1][0], data[5][0])
    with pytest.raises(IndexError):
        data[6]


def test_chosen_classes(folder: Path, tmp_path: Path) -> None:
    chosen = tmp_path / "classes.txt"
    chosen.write_text("dog\nant\n\n")
    data = open_data("images", folder, 8, "skip", chosen)
    assert data.class_names == ["ant", "dog"] and [label for _, label in data] == [0, 0, 0, 1]  # type: ignore[attr-defined]
    chosen.write_text("dog\nemu")
    with pytest.raises(DataError, match=r"lists classes that are not in .*: emu"):
        FolderData(folder, 8, classes=chosen)
    chosen.write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        FolderData(folder, 8, classes=chosen)
    with pytest.raises(DataError, match="cannot read the list of classes"):
        FolderData(folder, 8, classes=tmp_path / "nowhere.txt")


def test_images_become_the_networks_input(folder: Path) -> None:
    data = FolderData(folder, 8)
    batch = torch.stack([data[number][0] for number in range(3)])
    flip = torch.tensor([False, True, False])
    images = data.to_images(batch, flip, torch.randn(3, 3, 8, 8))
    assert images.dtype == torch.float32 and images.abs().max() <= 1
    assert np.array_equal(to_uint8(images)[0], batch[0].permute(1, 2, 0))
    assert torch.equal(images[1], data.to_images(batch, ~flip, torch.zeros(3, 3, 8, 8))[1].flip(-1))
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert np.array_equal(to_uint8(every.float() / 127.5 - 1), every.permute(0, 2, 3, 1))
    assert to_uint8(torch.tensor([-3.0, 3.0]).view(1, 1, 1, 2)).tolist() == [[[[0], [255]]]]


# --- what can be wrong


def damage(folder: Path) -> set[str]:
    """Cuts one JPEG off, and puts text in the place of another image; returns both files' names."""
    cut_off(folder / "cat" / "b.JPEG")
    (folder / "ant" / "1.jpg").write_text("no image at all")
    return {"b.JPEG", "1.jpg"}


def test_unreadable_images_are_replaced(folder: Path) -> None:
    intact = FolderData(folder, 8)
    expected = {number: intact[number] for number in (1, 5)}
    names = damage(folder)
    data = FolderData(folder, 8)
    with pytest.warns(UserWarning, match="takes its place") as caught:
        items = [data[number] for number in range(6)] + [data[number] for number in range(6)]
    assert len(caught) == 2  # one for each file, not for each time
    assert {Path(str(warning.message).split()[2].rstrip(":")).name for warning in caught} == names
    for damaged, following in ((0, 1), (4, 5), (6, 1), (10, 5)):
        assert torch.equal(items[damaged][0], expected[following][0]) and items[damaged][1] == expected[following][1]


@pytest.mark.filterwarnings("ignore:cannot read")
def test_workers_replace_the_same_images(folder: Path) -> None:
    damage(folder)
    data = FolderData(folder, 8)
    loaders = [DataLoader(data, batch_size=2, num_workers=workers) for workers in (0, 2)]
    alone, shared = (list(loader) for loader in loaders)
    assert all(
        torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) for one, two in zip(alone, shared, strict=True)
    )
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[4][0], data[4][0])


@pytest.mark.filterwarnings("ignore:cannot read")
def test_one_worker_tells_the_others(folder: Path) -> None:
    damage(folder)
    data = FolderData(folder, 8)
    list(DataLoader(data, batch_size=2, num_workers=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no second warning in this process
        list(DataLoader(data, batch_size=2))


def test_two_workers_warn_of_a_file_once(folder: Path) -> None:
    """Also when both read it at the same time: the process they load for does."""
    names = damage(folder)
    data = RandomisedData(FolderData(folder, 8), 0.0, False)
    sampler = StepSampler(6, Share(6), 0, 0, 6)
    with pytest.warns(UserWarning, match="takes its place") as caught:
        assert len(list(load_batches(data, sampler, 2, torch.device("cpu")))) == 6
    assert sorted(Path(str(warning.message).split()[2].rstrip(":")).name for warning in caught) == sorted(names)


def test_no_image_can_be_read(folder: Path) -> None:
    for name in find_images(folder):
        (folder / name).write_bytes(b"")
    with warnings.catch_warnings(), pytest.raises(DataError, match="none of the 6 images"):
        warnings.simplefilter("ignore")
        FolderData(folder, 8)[2]


def test_refusing_lists_every_unreadable_image(folder: Path) -> None:
    open_data("images", folder, 8, "refuse")
    damage(folder)
    with pytest.raises(DataError, match=r"2 of 6 images cannot be read: .*1\.jpg.*; .*b\.JPEG"):
        open_data("images", folder, 8, "refuse")
    (folder / "cat" / "b.JPEG").unlink()
    (folder / "ant" / "1.jpg").unlink()
    data = FolderData(folder, 8, "refuse")
    cut_off(folder / "cat" / "a.png")
    with pytest.raises(DataError, match=r"a\.png"):
        data[2]


def test_wrong_folders_say_what_was_expected(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*nowhere; expected one sub-folder per class"):
        FolderData(tmp_path / "nowhere", 8)
    with pytest.raises(DataError, match=r"no class folders in .*deep; expected"):
        FolderData(folder / "ant" / "deep", 8)
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"no images in these class folders of .*: empty; expected"):
        FolderData(folder, 8)


@pytest.mark.parametrize(
    "link, target",
    [
        ("cat/loop", "cat"), ("cat/loop", "."), ("ant/deep/loop", "ant"), ("ant/loop", "ant/deep"), ("fox", "cat"),
        ("cat/ants", "ant"), ("fox", "."),
    ],
)  # fmt: skip
def test_links_that_lead_to_a_folder_twice_are_refused(folder: Path, link: str, target: str) -> None:
    """Into itself, to the class, to all classes, and to another class, whose images would have two labels."""
    (folder / link).symlink_to(folder / target)
    with pytest.raises(DataError, match=r"is a link to .*, whose images would count twice: remove one of them"):
        FolderData(folder, 8)


def test_links_to_folders_elsewhere_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "ant" / "deep").rename(tmp_path / "elsewhere")
    (folder / "ant" / "deep").symlink_to(tmp_path / "elsewhere")
    assert find_images(folder / "ant") == ["1.jpg", "2.png", "deep/0.png"]
    (folder / "ant" / "deep" / "loop").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="count twice"):
        find_images(folder / "ant")


def test_a_folder_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot read the folder .*deep: Permission denied"):
        FolderData(folder, 8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("digits", Path("x"), None), "have no path; got x"),
        (("digits", None, 16), "8 pixels wide; got an image size of 16"),
        (("images", None, 8), "images need the path"),
        (("images", Path("x"), None), "need an image size"),
        (("images", Path("x"), 0), "at least 1 pixel; got 0"),
        (("latents", None, None), "latents need the path"),
        (("latents", Path("x"), None, "skip", Path("y")), "from an image folder only"),
        (("sound", None, None), "unknown kind of data 'sound': choose digits"),
    ],
)
def test_bad_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(*arguments)


# --- the reference batch of the ADM evaluator


def test_reference_batch_holds_the_images_as_they_are_trained_on(tmp_path: Path) -> None:
    from examples.dydi_lit.reference_batch import ReferenceConfig, write_reference

    random = np.random.default_rng(0)
    for name in ("b", "a", "c"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            pixels = random.integers(0, 256, (20, 30, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    (tmp_path / "chosen.txt").write_text("c\na\n")
    config = ReferenceConfig(tmp_path / "images", tmp_path / "new" / "r.npz", 16, tmp_path / "chosen.txt", workers=0)
    assert write_reference(config) == 6
    found = np.load(config.output)
    data = open_data("images", config.images, 16, "skip", config.classes)
    assert found["arr_1"].tolist() == [0, 0, 0, 1, 1, 1]
    assert found["arr_0"].dtype == np.uint8 and found["arr_0"].shape == (6, 16, 16, 3)
    for pixels, (image, _) in zip(found["arr_0"], (data[i] for i in range(6)), strict=True):
        assert np.array_equal(pixels, image.permute(1, 2, 0).numpy())

    (tmp_path / "images" / "a" / "1.png").write_bytes(b"cut short")
    with pytest.raises(DataError, match=r"1 of 6 images cannot be read: .*a/1\.png"):
        write_reference(config)
    with pytest.raises(DataError, match=r"must be a file called \*\.npz; got .*r\.npy"):
        write_reference(replace(config, output=tmp_path / "r.npy"))
