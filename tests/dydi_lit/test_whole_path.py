"""From a folder of images to a shared model, as a newcomer would go, in tiny sizes: every command once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("examples.dydi_lit")

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image

from examples.dydi_lit import evaluate, extract_latents, figures, generate, sample, train
from examples.dydi_lit.checkpoint import load_ema_model, read_losses
from examples.dydi_lit.pipeline import DyDiLiTPipeline

ROOT = Path(__file__).parents[2]
CLASSES = ("apple", "pear")


def run(command: object, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    command.main()  # type: ignore[attr-defined]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of six pictures, of several sizes, and one that is cut short."""
    random, folder = np.random.default_rng(0), tmp_path / "images"
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(6):
            pixels = random.integers(0, 256, (40 + 7 * number, 50, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")
    whole = (folder / "pear" / "3.jpg").read_bytes()
    (folder / "pear" / "3.jpg").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
    ).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.mark.slow
def test_from_images_to_a_shared_model(
    images: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    latents, checkpoint = tmp_path / "latents", tmp_path / "run" / "checkpoint"
    with pytest.warns(UserWarning, match=r"cannot read .*pear/3\.jpg"):
        run(
            extract_latents,
            monkeypatch,
            images,
            latents,
            "--vae",
            vae,
            "--image-size",
            32,
            "--shard-size",
            5,
            "--workers",
            1,
        )

    options = ["--data", "latents", "--data-path", latents, "--size", "toy", "--batch-size", 4, "--steps", 12]
    options += ["--warmup-steps", 2, "--save-every", 2, "--log-every", 1, "--output", tmp_path / "run"]
    killed_after_a_checkpoint(checkpoint, *options)
    done = len(read_losses(checkpoint))
    assert 2 <= done < 12
    run(train, monkeypatch, "--resume", checkpoint)
    run(train, monkeypatch, *options, "--output", tmp_path / "straight")
    assert read_losses(checkpoint) == read_losses(tmp_path / "straight" / "checkpoint")
    assert len(read_losses(checkpoint)) == 12

    run(sample, monkeypatch, checkpoint, "--per-class", 2, "--steps", 2, "--output", tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size[0] > 32
    drawing = ["--samples", 6, "--steps", 3, "--batch-size", 4, "--guidance", 4.0, "--output", tmp_path / "drawn.npz"]
    run(generate, monkeypatch, checkpoint, *drawing)
    drawn = np.load(tmp_path / "drawn.npz")
    assert drawn["arr_0"].shape == (6, 32, 32, 3) and drawn["arr_0"].dtype == np.uint8
    assert drawn["arr_1"].tolist() == [0, 1, 0, 1, 0, 1]

    (images / "pear" / "3.jpg").unlink()
    compared = ["--reference", images, "--image-size", 32, "--features", "pixels", "--json", tmp_path / "figures.json"]
    run(evaluate, monkeypatch, tmp_path / "drawn.npz", *compared)
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["fid"] > 0 and found["num_reference"] == 11 and "torchmetrics" in found["evaluator"]

    run(figures, monkeypatch, checkpoint, "--output", tmp_path / "figures", "--per-class", 1, "--steps", 2)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "loss.png", "routing.png", "maps.png", "lambda.png",
    }  # fmt: skip

    pipe = DyDiLiTPipeline.from_checkpoint(checkpoint)
    pipe.save_pretrained(tmp_path / "shared")
    loaded = DyDiLiTPipeline.from_pretrained(tmp_path / "shared")
    arguments = {"class_labels": ["pear", 0], "num_inference_steps": 2, "output_type": "np"}
    before, after = (each(**arguments, generator=torch.Generator().manual_seed(1)).images for each in (pipe, loaded))
    assert before.shape == (2, 32, 32, 3)
    np.testing.assert_allclose(after, before, atol=1e-5)
    ours, theirs = loaded.transformer.state_dict(), load_ema_model(checkpoint, fuse=False).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "FID" in capsys.readouterr().out


def killed_after_a_checkpoint(checkpoint: Path, *options: object) -> None:
    """Starts the training command in a process of its own, and kills it without warning after its first checkpoint."""
    command = [sys.executable, "-m", "examples.dydi_lit.train", *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, printed = process.communicate()
    assert checkpoint.exists(), printed
    assert process.returncode == -signal.SIGKILL, printed
