"""Latents: extraction from images good and bad, stopped and resumed, and the training data that comes of it."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

pytest.importorskip("examples.dydi_lit")

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from examples.dydi_lit import extract_latents
from examples.dydi_lit.data import DataError, open_data, read_image
from examples.dydi_lit.extract_latents import ExtractConfig, extract
from examples.dydi_lit.latents import LatentData, read_index, shard_file

ROOT = Path(__file__).parents[2]
SIZES = [
    ("ant/0.png", 16, 16),
    ("ant/1.jpg", 40, 20),
    ("ant/2.png", 9, 30),
    ("bee/0.jpg", 64, 64),
    ("bee/1.png", 17, 16),
]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VAE with random weights, saved as diffusers saves one; its latents are half as wide as the images."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def config(vae: Path, tmp_path: Path) -> ExtractConfig:
    """Five images of two classes into three shards."""
    random = np.random.default_rng(0)
    for name, width, height in SIZES:
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
    return ExtractConfig(
        tmp_path / "images", tmp_path / "latents", vae=str(vae), image_size=8, batch_size=3, shard_size=2, workers=0
    )


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


# --- what is stored


def test_moments_are_the_vaes(config: ExtractConfig) -> None:
    assert extract(config) == (5, 0)
    data = open_data("latents", config.output, 8, "refuse")
    assert isinstance(data, LatentData)
    vae = AutoencoderKL.from_pretrained(config.vae)
    assert len(data) == 5 and [data[number][1] for number in range(5)] == [0, 0, 0, 1, 1]
    for number, (name, _, _) in enumerate(SIZES):
        image = read_image(config.images / name, 8).float()[None] / 127.5 - 1
        for side, pixels in enumerate((image, image.flip(-1))):
            with torch.no_grad():
                posterior = vae.encode(pixels).latent_dist
            mean, std = data[number][0][side].float()
            torch.testing.assert_close(mean, posterior.mean[0], rtol=5e-3, atol=5e-3)
            torch.testing.assert_close(std, posterior.std[0], rtol=5e-3, atol=5e-3)
    assert data.describe() == {
        "kind": "latents", "channels": 4, "size": 4, "num_classes": 2, "class_names": ["ant", "bee"],
        "num_images": 5, "scaling_factor": 0.5, "vae": config.vae, "image_size": 8,
    }  # fmt: skip
    assert json.loads(json.dumps(data.describe())) == data.describe()


def test_the_posterior_is_sampled_and_scaled(config: ExtractConfig) -> None:
    extract(config)
    data = LatentData(config.output)
    moments = torch.stack([data[1][0]] * 2000)
    flip = torch.arange(2000) % 2 == 1
    drawn = data.to_images(moments, flip, torch.randn(2000, 4, 4, 4))
    assert drawn.shape == (2000, 4, 4, 4) and drawn.dtype == torch.float32
    for side in (0, 1):
        mean, std = data[1][0][side].float() * 0.5
        torch.testing.assert_close(drawn[side::2].mean(0), mean, atol=0.2 * std.max().item(), rtol=0)
        torch.testing.assert_close(drawn[side::2].std(0), std, rtol=0.15, atol=0)
    plain = data.to_images(moments[:2], flip[:2], torch.zeros(2, 4, 4, 4))
    assert torch.equal(plain, moments[0, :, 0].float() * 0.5)
    assert not torch.allclose(plain[0].flip(-1), plain[1], atol=1e-2)  # a VAE does not mirror latents


def test_without_mirror_images(config: ExtractConfig) -> None:
    extract(replace(config, flip=False))
    data = LatentData(config.output)
    moments = torch.stack([data[number][0] for number in range(3)])
    assert moments.shape == (3, 1, 2, 4, 4, 4)
    noise, flip = torch.randn(3, 4, 4, 4), torch.tensor([True, False, True])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = data.to_images(moments, torch.zeros(3, dtype=torch.bool), noise)
    with pytest.warns(UserWarning, match="no mirror images") as caught:
        assert all(torch.equal(data.to_images(moments, flip, noise), plain) for _ in range(2))
    assert len(caught) == 1


def test_chosen_classes(config: ExtractConfig, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("bee\n")
    assert extract(replace(config, classes=tmp_path / "classes.txt")) == (2, 0)
    assert LatentData(config.output).class_names == ["bee"]


# --- stopped and resumed


def test_a_stopped_run_goes_on_and_writes_the_same(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    straight = replace(config, output=tmp_path / "straight")
    extract(straight)
    save_shard, written = extract_latents.save_shard, []

    def stop_at_second(file: Path, *content: Any) -> None:
        if written:
            file.with_name(file.name + ".partial").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        written.append(file)
        save_shard(file, *content)

    with monkeypatch.context() as patch:
        patch.setattr(extract_latents, "save_shard", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            extract(config)
    kept = shard_file(config.output, 0)
    assert written == [kept] and not shard_file(config.output, 1).exists()
    time_written = kept.stat().st_mtime_ns
    assert extract(config) == (5, 0)
    assert kept.stat().st_mtime_ns == time_written
    assert bytes_of(config.output) == bytes_of(straight.output)
    assert len(bytes_of(config.output)) == 4  # an index, three shards, nothing temporary


def test_damaged_shards_are_written_anew(config: ExtractConfig) -> None:
    extract(config)
    whole = bytes_of(config.output)
    cut_off(shard_file(config.output, 1))
    shard_file(config.output, 2).unlink()
    extract(config)
    assert bytes_of(config.output) == whole


@pytest.mark.parametrize(
    "change, differs",
    [({"image_size": 16}, "image_size, size"), ({"flip": False}, "orientations"), ({"shard_size": 3}, "shard_size")],
)
def test_other_settings_are_refused(config: ExtractConfig, change: dict, differs: str) -> None:
    extract(config)
    whole = bytes_of(config.output)
    with pytest.raises(DataError, match=rf"holds latents of other settings \({differs} differ\)"):
        extract(replace(config, **change))
    assert bytes_of(config.output) == whole


def test_other_images_or_weights_are_refused(config: ExtractConfig, tmp_path: Path) -> None:
    extract(config)
    other = shutil.copytree(config.vae, tmp_path / "vae")
    vae = AutoencoderKL.from_pretrained(str(other))
    with torch.no_grad():
        next(vae.parameters()).add_(0.1)
    vae.save_pretrained(other)
    with pytest.raises(DataError, match=r"\(vae, vae_sha256 differ\)"):
        extract(replace(config, vae=str(other)))
    (config.images / "ant" / "2.png").rename(config.images / "ant" / "3.png")
    with pytest.raises(DataError, match=r"\(files_sha256 differ\)"):
        extract(config)


@pytest.fixture
def one_thread() -> Iterator[dict[str, str]]:
    """One thread in this process, and the environment that gives another process one: sums are taken in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {**os.environ, "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_killed_process_goes_on(config: ExtractConfig, tmp_path: Path, one_thread: dict[str, str]) -> None:
    for copy in range(40):
        shutil.copy(config.images / "ant" / "1.jpg", config.images / "ant" / f"copy{copy:02}.jpg")
    config = replace(config, shard_size=1, batch_size=1)
    command = [sys.executable, "-m", "examples.dydi_lit.extract_latents", str(config.images), str(config.output)]
    command += ["--vae", config.vae, "--image-size", "8", "--shard-size", "1", "--batch-size", "1", "--workers", "0"]
    process = subprocess.Popen(command, cwd=ROOT, env=one_thread, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not shard_file(config.output, 3).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert shard_file(config.output, 3).exists()
    extract(config)
    straight = replace(config, output=tmp_path / "straight")
    extract(straight)
    assert bytes_of(config.output) == bytes_of(straight.output)


@pytest.mark.slow
def test_two_processes_write_what_one_does(config: ExtractConfig, tmp_path: Path, one_thread: dict[str, str]) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", "examples.dydi_lit.extract_latents", str(config.images), str(config.output), "--vae", config.vae]
    command += ["--image-size", "8", "--shard-size", "2", "--workers", "0", "--batch-size", "3"]
    done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("holds the latents of 5 images") == 1  # said once, not twice
    alone = replace(config, output=tmp_path / "alone")
    extract(alone)
    assert bytes_of(config.output) == bytes_of(alone.output)


# --- what can be wrong


def test_unreadable_images_are_left_out(config: ExtractConfig) -> None:
    extract(config)
    expected = LatentData(config.output)
    cut_off_image = config.images / "ant" / "1.jpg"
    cut_off_image.write_bytes(cut_off_image.read_bytes()[:300])
    (config.images / "bee" / "1.png").write_text("no image")  # alone in the third shard
    skipping = replace(config, output=config.output / "skipped")
    with pytest.warns(UserWarning, match=r"cannot read .*; left out") as caught:
        assert extract(skipping) == (3, 2)
    assert len(caught) == 2
    data = LatentData(skipping.output, corrupt="refuse")
    assert data.labels.tolist() == [0, 0, 1]
    for number, original in enumerate((0, 2, 3)):
        torch.testing.assert_close(data[number][0], expected[original][0], atol=2e-3, rtol=2e-3)
    with pytest.raises(DataError, match=r"2 of 5 images cannot be read: .*1\.jpg.*1\.png"):
        extract(replace(config, output=config.output / "refused", corrupt="refuse"))


def test_no_image_is_left(config: ExtractConfig) -> None:
    for name, _, _ in SIZES:
        (config.images / name).write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert extract(config) == (0, 5)
    with pytest.raises(DataError, match="of no images at all"):
        LatentData(config.output)


def test_shards_missing_or_damaged_are_named_at_the_start(config: ExtractConfig) -> None:
    extract(config)
    whole = LatentData(config.output)
    cut_off(shard_file(config.output, 0))
    shard_file(config.output, 2).unlink()
    faults = r"2 of 3 shards cannot be used: .*shard-00000.* is damaged.*; .*shard-00002.* is missing"
    with pytest.raises(DataError, match=faults):
        open_data("latents", config.output, None, "refuse")
    with pytest.warns(UserWarning, match=faults) as caught:
        data = LatentData(config.output)
    assert len(caught) == 1 and len(data) == 2
    for number in range(2):
        assert torch.equal(data[number][0], whole[number + 2][0]) and data[number][1] == whole[number + 2][1]
    shard_file(config.output, 1).write_bytes(b"")
    with pytest.raises(DataError, match="3 of 3 shards cannot be used"):
        LatentData(config.output)


def test_shards_of_another_folder_are_noticed(config: ExtractConfig, tmp_path: Path) -> None:
    extract(config)
    other = replace(config, output=tmp_path / "other", image_size=16)
    extract(other)
    shutil.copy(shard_file(other.output, 1), shard_file(config.output, 1))
    with pytest.raises(DataError, match=r"shard-00001.* does not fit its index: .*\[2, 2, 2, 4, 8, 8\], expected F16"):
        LatentData(config.output, corrupt="refuse")
    index = json.loads((other.output / "index.json").read_text())
    (other.output / "index.json").write_text(json.dumps({**index, "class_names": ["ant"]}))
    with pytest.raises(DataError, match=r"labels outside the 1 classes"):
        LatentData(other.output, corrupt="refuse")


def test_folders_that_hold_no_latents(config: ExtractConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no latents at .*nowhere: .*extract_latents writes one"):
        LatentData(tmp_path / "nowhere")
    (tmp_path / "index.json").write_text('{"vae": "x"}')
    with pytest.raises(DataError, match="is not an index of latents"):
        LatentData(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(DataError, match="is not an index of latents"):
        LatentData(tmp_path)
    extract(config)
    with pytest.raises(DataError, match="are of 8 pixel images, not 16"):
        LatentData(config.output, 16)


def test_values_too_large_for_float16(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    load_vae = extract_latents.load_vae

    def loud_vae(name: str) -> AutoencoderKL:
        vae = load_vae(name)
        vae.quant_conv.bias.data[0] = 1e6
        return vae

    monkeypatch.setattr(extract_latents, "load_vae", loud_vae)
    with pytest.raises(DataError, match=r"output for ant/0\.png is not finite in float16"):
        extract(config)


# --- as training data


def test_workers_and_pickling(config: ExtractConfig) -> None:
    extract(config)
    data = LatentData(config.output)
    data[0]  # opens a shard in this process
    alone = list(DataLoader(data, batch_size=2))
    for loaded in (data, pickle.loads(pickle.dumps(data))):
        shared = list(DataLoader(loaded, batch_size=2, num_workers=2))
        for one, two in zip(alone, shared, strict=True):
            assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    with pytest.raises(IndexError):
        data[5]
    assert torch.equal(data[-1][0], data[4][0])


def test_workers_extract_the_same(config: ExtractConfig) -> None:
    extract(config)
    other = replace(config, output=config.output.with_name("other"), workers=2)
    extract(other)
    assert bytes_of(config.output) == bytes_of(other.output)
    assert read_index(other.output).num_shards == 3


# --- the command


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["extract_latents", *map(str, arguments)])
    extract_latents.main()


def test_command(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--vae", config.vae, "--image-size", 8, "--workers", 0]
    run_command(monkeypatch, config.images, config.output, *options)
    assert "holds the latents of 5 images; 0 could not be read" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        run_command(monkeypatch, "--help")
    assert ended.value.code == 0 and "sd-vae-ft-ema" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--image-size", 9], "image_size must be a multiple of 2 for this VAE; got 9"),
        (["--batch-size", 0], "batch_size must be at least 1; got 0"),
        (["--workers", -1], "workers must be at least 0; got -1"),
        (["--vae", "/nowhere"], "cannot load the VAE /nowhere"),
        (["--classes", "/nowhere"], "cannot read the list of classes /nowhere"),
    ],
)
def test_errors_are_one_line(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch, options: list, message: str
) -> None:
    with pytest.raises(SystemExit, match=f"error: {message}") as ended:
        run_command(monkeypatch, config.images, config.output, "--vae", config.vae, "--image-size", 8, *options)
    assert "\n" not in str(ended.value.code)
    assert not config.output.exists()
