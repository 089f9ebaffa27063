"""Grids of classes, and the .npz for the ADM evaluator."""

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

pytest.importorskip("examples.dydi_lit")

from torch import Tensor, nn

from examples.dydi_lit import drawing, generate, sample
from examples.dydi_lit.checkpoint import CheckpointError
from examples.dydi_lit.configs import Model, config_of
from examples.dydi_lit.data import DataError, to_uint8
from examples.dydi_lit.diffusion import seeds_of
from examples.dydi_lit.drawing import DrawConfig, Drawer
from examples.dydi_lit.generate import GenerateConfig
from examples.dydi_lit.model import DiffusionTransformer
from examples.dydi_lit.sample import SampleConfig, classes_to_show, labels_of

ROOT = Path(__file__).parents[2]


def write_checkpoint(
    folder: Path, kind: str, *, channels: int, num_classes: int, model: Model = "dydi-lit", **data: object
) -> Path:
    """What drawing needs of a checkpoint, of a model with random weights for images or latents of size 8."""
    config = config_of(
        model,
        "tiny",
        dim=16,
        depth=1,
        in_channels=channels,
        num_classes=num_classes,
        learn_sigma=False,
        initialization="dit",  # its small embeddings leave random networks tame
    )
    network = DiffusionTransformer(config)
    for name, weight in network.named_parameters():
        if name.startswith(("output", "modulation", "blocks.0.modulation")):
            nn.init.normal_(weight, std=0.2)
    network.save_pretrained(folder)
    described = {"kind": kind, "channels": channels, "size": 8, "num_classes": num_classes}
    names = [f"class {number}" for number in range(num_classes)]
    training = {
        "steps_done": 1,
        "train": {"model": model, "size": "tiny"},
        "data": {**described, "class_names": names, **data},
    }
    (folder / "training.json").write_text(json.dumps(training))
    return folder


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "digits", "digits", channels=1, num_classes=3)


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    """Latents of a VAE that halves the size; of eleven classes."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
    )
    vae.save_pretrained(tmp_path / "vae")
    scale = {"scaling_factor": 0.5, "vae": str(tmp_path / "vae")}
    return write_checkpoint(tmp_path / "latents", "latents", channels=4, num_classes=11, **scale)


def run_command(command: object, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    command.main()  # type: ignore[attr-defined]


# --- pictures


def test_pixels_are_drawn_and_cut(digits: Path) -> None:
    draw = Drawer(DrawConfig(digits, steps=2))
    images = draw(torch.tensor([0, 2]), [1, 2])
    assert images.shape == (2, 1, 8, 8) and images.dtype == torch.float32 and images.abs().max() <= 1
    assert torch.equal(draw.to_images(torch.tensor([-3.0, 0.5, 2.0])), torch.tensor([-1.0, 0.5, 1.0]))


def test_latents_are_scaled_and_decoded(latents: Path) -> None:
    draw = Drawer(DrawConfig(latents, steps=2))
    assert draw(torch.tensor([0, 10]), [1, 2]).shape == (2, 3, 16, 16)
    drawn = torch.randn(9, 4, 8, 8)  # more than are decoded at once
    vae = AutoencoderKL.from_pretrained(latents.parent / "vae")
    with torch.no_grad():
        expected = torch.cat([vae.decode(2 * latent[None]).sample for latent in drawn]).clamp(-1, 1)
    torch.testing.assert_close(draw.to_images(drawn), expected, atol=1e-5, rtol=1e-4)


def test_latents_are_not_clipped(latents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    def record(model: object, labels: Tensor, **options: object) -> Tensor:
        given.update(options)
        return torch.zeros(len(labels), 4, 8, 8)

    monkeypatch.setattr(drawing, "sample", record)
    Drawer(DrawConfig(latents, steps=7, guidance=3.0, guided_channels="three", sampler="ddpm"))(torch.zeros(1), [0])
    expected = {"size": 8, "seeds": [0], "steps": 7, "guidance": 3.0, "guided_channels": "three", "sampler": "ddpm"}
    assert given == {**expected, "clip": False, "progress": False}


def test_another_vae_can_be_named(latents: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot load the VAE .*nowhere"):
        Drawer(DrawConfig(latents, vae=str(tmp_path / "nowhere")))
    wide = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(DataError, match="has latents of 2 channels, not of 4"):
        Drawer(DrawConfig(latents, vae=str(tmp_path / "wide")))


def test_bfloat16_changes_little(latents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is drawn before it is cut: the first step of a random network goes far beyond what can be shown."""
    monkeypatch.setattr(Drawer, "to_images", lambda draw, drawn: drawn)
    exact, rounded = (
        Drawer(DrawConfig(latents, steps=2, mixed_precision=precision))(torch.tensor([0, 1]), [0, 1])  # type: ignore
        for precision in ("no", "bf16")
    )
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    assert (rounded - exact).norm() < 0.02 * exact.norm()


# --- grids


def test_a_class_to_a_row(digits: Path, tmp_path: Path) -> None:
    config = SampleConfig(digits, output=tmp_path / "new" / "grid.png", steps=2, per_class=2)
    images = sample.draw_grid(config)
    assert images.shape == (6, 1, 8, 8)
    with Image.open(config.output) as picture:
        assert picture.height > picture.width / 2  # three rows of two
    draw = Drawer(config)
    torch.testing.assert_close(images[3:4], draw(torch.tensor([1]), seeds_of(0, [3])))
    assert torch.equal(images, sample.draw_grid(config))
    assert not torch.allclose(images, sample.draw_grid(replace(config, seed=1)))
    torch.testing.assert_close(images, sample.draw_grid(replace(config, batch_size=4)))
    chosen = sample.draw_grid(replace(config, classes=(2, 1)))
    torch.testing.assert_close(chosen[:2], draw(torch.tensor([2, 2]), seeds_of(0, [0, 1])))


def test_a_model_to_a_row(digits: Path, tmp_path: Path) -> None:
    """Each draws the same classes from the same noise as it does alone."""
    other = write_checkpoint(tmp_path / "other", "digits", channels=1, num_classes=3, model="sana")
    config = SampleConfig(digits, output=tmp_path / "grid.png", steps=2, per_class=2, classes=(2, 0))
    alone = [sample.draw_grid(replace(config, checkpoint=folder)) for folder in (digits, other)]
    both = sample.draw_grid(replace(config, compare=(other,)))
    torch.testing.assert_close(both, torch.cat(alone))
    with Image.open(config.output) as picture:
        assert picture.width > 1.5 * picture.height  # two rows of four
    foreign = write_checkpoint(tmp_path / "foreign", "digits", channels=1, num_classes=4)
    with pytest.raises(ValueError, match=r"foreign and .*digits were trained on other classes"):
        sample.draw_grid(replace(config, compare=(foreign,)))


def test_a_grid_of_latents_is_in_colour(latents: Path, tmp_path: Path) -> None:
    config = SampleConfig(latents, output=tmp_path / "grid.png", steps=1, per_class=1)
    assert sample.draw_grid(config).shape == (8, 3, 16, 16)  # eight of eleven classes


def test_classes_and_labels() -> None:
    assert classes_to_show(10) == tuple(range(10))
    assert classes_to_show(11) == classes_to_show(100) == tuple(range(8))
    assert len(classes_to_show(1000)) == 8 and 207 in classes_to_show(1000)
    assert labels_of(2).tolist() == [digit for digit in range(10) for _ in range(2)]
    assert labels_of(2, [7, 3]).tolist() == [7, 7, 3, 3] and labels_of(1).dtype == torch.int64


# --- the .npz


def npz_config(checkpoint: Path, **changes: object) -> GenerateConfig:
    output = checkpoint.parent / "out" / "samples.npz"
    return replace(GenerateConfig(checkpoint, output=output, samples=10, batch_size=4, steps=3), **changes)  # type: ignore


def test_the_npz_is_what_the_evaluator_reads(digits: Path) -> None:
    config = npz_config(digits)
    assert generate.generate(config) == config.output
    with np.load(config.output) as arrays:
        assert sorted(arrays) == ["arr_0", "arr_1"]
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.shape == (10, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0] and labels.dtype == np.int64
    assert (images == images[..., :1]).all() and images.std() > 1
    with zipfile.ZipFile(config.output) as archive:
        assert archive.testzip() is None
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
    assert sorted(entry.name for entry in config.output.parent.iterdir()) == ["samples.npz", "samples.npz.json"]
    told = json.loads(config.output.with_name("samples.npz.json").read_text())
    assert (told["model"], told["size"], told["guidance"], told["data"]["num_classes"]) == ("dydi-lit", "tiny", 1.0, 3)

    # image i depends on the seed and i alone
    draw = Drawer(config)
    alone = to_uint8(torch.cat([draw(torch.tensor([i % 3]), seeds_of(0, [i])) for i in range(10)]))
    assert np.abs(images[..., :1].astype(int) - alone).max() <= 1
    generate.generate(replace(config, batch_size=7))
    with np.load(config.output) as arrays:
        assert np.abs(images.astype(int) - arrays["arr_0"]).max() <= 1


def test_latents_give_colour_images(latents: Path) -> None:
    config = npz_config(latents, samples=2, steps=1)
    with np.load(generate.generate(config)) as arrays:
        assert arrays["arr_0"].shape == (2, 16, 16, 3)
        assert not (arrays["arr_0"] == arrays["arr_0"][..., :1]).all()


def test_a_stopped_run_goes_on(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = npz_config(digits)
    whole = generate.generate(config).read_bytes()
    config.output.unlink()

    drawn: list[int] = []
    call = Drawer.__call__

    def count(self: Drawer, labels: Tensor, *rest: object, **options: object) -> Tensor:
        drawn.append(len(labels))
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return call(self, labels, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Drawer, "__call__", count)
    with pytest.raises(KeyboardInterrupt):
        generate.generate(config)
    parts = config.output.with_name("samples.npz.parts")
    assert not config.output.exists() and (parts / "batch-000000.npy").exists()
    (parts / "batch-000001.partial").write_bytes(b"cut short")

    for change in ({"seed": 1}, {"samples": 12}, {"batch_size": 5}, {"mixed_precision": "bf16"}):
        with pytest.raises(CheckpointError, match=rf"unfinished run with {next(iter(change))} .* delete the folder"):
            generate.generate(replace(config, **change))  # type: ignore[arg-type]
    generate.generate(config)
    assert drawn == [4, 4, 4, 2]  # the first batch was not drawn again
    assert config.output.read_bytes() == whole and not parts.exists()


def test_parts_may_be_a_link(digits: Path, tmp_path: Path) -> None:
    config = npz_config(digits)
    (tmp_path / "elsewhere").mkdir()
    config.output.parent.mkdir()
    config.output.with_name("samples.npz.parts").symlink_to(tmp_path / "elsewhere")
    assert generate.generate(config).exists() and not (tmp_path / "elsewhere").exists()


def test_parts_of_other_weights_are_refused(digits: Path) -> None:
    config = npz_config(digits)
    parts = config.output.with_name("samples.npz.parts")
    generate.prepare_parts(parts, generate.settings_of(config, Drawer(config)))
    write_checkpoint(digits, "digits", channels=1, num_classes=3)
    with pytest.raises(CheckpointError, match="unfinished run with weights_sha256"):
        generate.generate(config)


@pytest.mark.slow
def test_two_processes_finish_what_a_killed_one_began(digits: Path) -> None:
    config = npz_config(digits, samples=22, steps=200)
    one = generate.generate(config).read_bytes()
    config.output.unlink()

    options = ["-m", "examples.dydi_lit.generate", str(digits), "--output", str(config.output)]
    options += ["--samples", "22", "--batch-size", "4", "--steps", "200"]
    run: dict[str, Any] = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}}
    first, last = (config.output.with_name("samples.npz.parts") / f"batch-00000{number}.npy" for number in (0, 5))
    process = subprocess.Popen([sys.executable, *options], stderr=subprocess.DEVNULL, **run)
    while not first.exists() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert first.exists() and not last.exists()

    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run([*launch, *options], capture_output=True, text=True, **run)
    assert done.returncode == 0, done.stderr
    assert config.output.read_bytes() == one and not first.parent.exists()
    assert done.stdout.count("wrote") == 1


# --- commands


@pytest.mark.parametrize("command", [sample, generate])
def test_help(command: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(command, monkeypatch, "--help")
    assert ended.value.code == 0
    assert "--guidance" in capsys.readouterr().out


@pytest.mark.parametrize("command", [sample, generate])
def test_missing_checkpoint_is_one_line(command: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: no checkpoint at .*nowhere"):
        run_command(command, monkeypatch, str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "command, option, message",
    [
        (sample, ["--steps", "0"], r"steps must be in 1\.\.1000; got 0"),
        (sample, ["--classes", "1", "3"], r"classes must be in 0\.\.2; got \(1, 3\)"),
        (sample, ["--per-class", "0"], "per_class must be at least 1; got 0"),
        (sample, ["--batch-size", "0"], "batch_size must be at least 1; got 0"),
        (sample, ["--seed", "-1"], "seed must be at least 0; got -1"),
        (sample, ["--guidance", "nan"], "guidance must be finite; got nan"),
        (
            generate,
            ["--guided-channels", "three"],
            "guided_channels 'three' needs a model of 3 channels or more; this one has 1",
        ),
        (generate, ["--samples", "0"], "samples must be at least 1; got 0"),
        (generate, ["--output", "samples.zip"], r"output must be a file called \*\.npz; got samples\.zip"),
    ],
)
def test_bad_options_are_named(
    command: object,
    option: list[str],
    message: str,
    digits: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_command(command, monkeypatch, str(digits), *option)
    in_box = " ".join(capsys.readouterr().err.replace("│", " ").split())  # tyro's own, for the configuration alone
    assert re.search(f"error: {message}|Error parsing .*: {message}", f"{ended.value.code} {in_box}")
    assert not (tmp_path / "runs").exists()


def test_commands_write_and_say_so(
    digits: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_command(sample, monkeypatch, str(digits), "--classes", "2", "0", "--per-class", "1", "--steps", "2")
    run_command(generate, monkeypatch, str(digits), "--samples", "3", "--steps", "2")
    assert Path("runs/samples.png").exists() and Path("runs/samples.npz").exists()
    printed = capsys.readouterr().out
    assert f"wrote {Path('runs/samples.png')}" in printed and f"wrote {Path('runs/samples.npz')}" in printed


def test_interrupted_generation_says_how_to_go_on(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "generate", interrupt)
    with pytest.raises(SystemExit, match="interrupted; give the same command again to go on"):
        run_command(generate, monkeypatch, str(digits))
