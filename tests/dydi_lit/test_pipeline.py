"""The pipeline: the images of `sample`, any scheduler, a folder and the Hub, and the model card."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

pytest.importorskip("examples.dydi_lit")

from huggingface_hub import ModelCard
from safetensors.torch import save_model
from torch import nn

from examples.dydi_lit import pipeline
from examples.dydi_lit.checkpoint import CheckpointError
from examples.dydi_lit.configs import config_of, to_json
from examples.dydi_lit.data import DataError
from examples.dydi_lit.diffusion import sample
from examples.dydi_lit.model import DiffusionTransformer
from examples.dydi_lit.model_card import card_kwargs
from examples.dydi_lit.pipeline import DyDiLiTPipeline, scheduler_of

DIGITS = [f"digit {number}" for number in range(10)]


def network(**changes: object) -> DiffusionTransformer:
    options = {"dim": 32, "depth": 2, "in_channels": 1, "num_classes": 10, **changes}
    model = DiffusionTransformer(config_of("dydi-lit", "tiny", **options)).eval()
    for name, weight in model.named_parameters():
        if name.startswith("output") or "modulation" in name:
            nn.init.normal_(weight, std=0.2)
    return model


def vae(**changes: object) -> AutoencoderKL:
    options = {"block_out_channels": (32,), "latent_channels": 4, "norm_num_groups": 8, "scaling_factor": 0.5}
    return AutoencoderKL(**{**options, **changes}).eval()


@pytest.fixture
def pixels() -> DyDiLiTPipeline:
    model = network()
    return quiet(DyDiLiTPipeline(model, scheduler_of(model.config, clip=True), size=8, class_names=DIGITS))


@pytest.fixture
def latents() -> DyDiLiTPipeline:
    model = network(in_channels=4)
    return quiet(DyDiLiTPipeline(model, scheduler_of(model.config, clip=False), vae(), size=8))


def quiet(pipe: DyDiLiTPipeline) -> DyDiLiTPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def training_of(model: DiffusionTransformer, **data: object) -> dict[str, Any]:
    described = {"kind": "digits", "channels": 1, "size": 8, "num_classes": 10, "class_names": DIGITS, **data}
    train = {"model": "dydi-lit", "size": "tiny", "learning_rate": 1e-4, "note": "a | b\nc", "output": "/home/me/run"}
    versions = {"torch": "2.13"}
    return {"steps_done": 7, "train": train, "model": to_json(model.config), "data": described, "versions": versions}


def write_checkpoint(folder: Path, model: DiffusionTransformer, **data: object) -> Path:
    model.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(training_of(model, **data)))
    return folder


# --- drawing


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_images_are_those_of_sample(learn_sigma: bool, guidance: float) -> None:
    model = network(learn_sigma=learn_sigma)
    pipe = quiet(DyDiLiTPipeline(model, scheduler_of(model.config, clip=True), size=8))
    images = pipe([3, 4], guidance, 12, generator=generators(5, 6), output_type="pt").images
    options = {"size": 8, "seeds": [5, 6], "guidance": guidance, "clip": True, "progress": False}
    expected = sample(model, torch.tensor([3, 4]), steps=12, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(images * 2 - 1, expected.clamp(-1, 1), atol=2e-4, rtol=0)

    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    images = pipe([3, 4], guidance, 10, generator=generators(5, 6), output_type="pt").images
    expected = sample(model, torch.tensor([3, 4]), steps=10, sampler="ddim", **options)  # type: ignore[arg-type]
    torch.testing.assert_close(images * 2 - 1, expected.clamp(-1, 1), atol=2e-4, rtol=0)


@pytest.mark.parametrize("guided_channels", ["all", "three"])
def test_latents_are_decoded(latents: DyDiLiTPipeline, guided_channels: Any) -> None:
    options = {"guided_channels": guided_channels, "generator": generators(5), "output_type": "pt"}
    images = latents([2], 3.0, 4, **options).images
    drawn = sample(
        latents.transformer, torch.tensor([2]), size=8, seeds=[5], steps=4, guidance=3.0,
        guided_channels=guided_channels, clip=False, progress=False,
    )  # fmt: skip
    with torch.no_grad():
        expected = latents.vae.decode(drawn / 0.5).sample  # type: ignore[union-attr]
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler, DDIMScheduler])
def test_other_schedulers(scheduler: Any, pixels: DyDiLiTPipeline, latents: DyDiLiTPipeline) -> None:
    """A variance that was learned for DDPM does not confuse those that have no use for it."""
    for pipe in (pixels, latents):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        images = pipe([1], num_inference_steps=3, generator=generators(0), output_type="np").images
        assert images.shape == (1, 8, 8, 1 if pipe is pixels else 3) and np.isfinite(images).all()
        assert np.ptp(images) > 0
        assert isinstance(pipe.scheduler, scheduler)


def test_learned_variance_is_cut_for_a_fixed_one(pixels: DyDiLiTPipeline) -> None:
    learned = pixels([1], num_inference_steps=3, generator=generators(0), output_type="np").images
    pixels.scheduler = DDPMScheduler.from_config(pixels.scheduler.config, variance_type="fixed_small")
    fixed = pixels([1], num_inference_steps=3, generator=generators(0), output_type="np").images
    assert np.isfinite(fixed).all() and (fixed != learned).any()


def test_output_types(pixels: DyDiLiTPipeline) -> None:
    def draw(output_type: str, **options: Any) -> Any:
        return pixels([1, 2], num_inference_steps=2, generator=generators(0, 1), output_type=output_type, **options)

    tensor, array, pictures = (draw(output_type).images for output_type in ("pt", "np", "pil"))
    assert tensor.shape == (2, 1, 8, 8) and tensor.dtype == torch.float32
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert array.min() >= 0 and array.max() <= 1
    assert [picture.mode for picture in pictures] == ["L", "L"]
    np.testing.assert_array_equal(np.asarray(pictures[1]), (array[1, ..., 0] * 255).round())
    (plain,) = draw("pt", return_dict=False)
    assert torch.equal(plain, tensor)


def test_labels_by_name_and_number(pixels: DyDiLiTPipeline) -> None:
    assert pixels.get_label_ids(["digit 7", "digit 0"]) == [7, 0]
    assert pixels.get_label_ids("digit 7") == [7]
    by_name, by_number, alone = (
        pixels(labels, num_inference_steps=2, generator=generators(3), output_type="pt").images
        for labels in (["digit 7"], [7], "digit 7")
    )
    assert torch.equal(by_name, by_number) and torch.equal(by_name, alone)


def test_one_generator_for_all(pixels: DyDiLiTPipeline) -> None:
    first, second = (
        pixels([1, 1], num_inference_steps=2, generator=torch.Generator().manual_seed(4), output_type="pt").images
        for _ in range(2)
    )
    assert torch.equal(first, second) and not torch.equal(first[0], first[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, latents: DyDiLiTPipeline) -> None:
    options = {"num_inference_steps": 2, "output_type": "np"}
    whole = latents([1], generator=generators(0), **options).images
    assert latents.to(dtype).dtype == dtype and latents.vae.dtype == dtype  # type: ignore[union-attr]
    half = latents([1], generator=generators(0), **options).images
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, whole, atol=0.1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"class_labels": []}, "class_labels must name at least one class"),
        ({"class_labels": [10]}, r"class_labels must be in 0\.\.9; got 10"),
        ({"class_labels": [-1]}, r"class_labels must be in 0\.\.9; got -1"),
        ({"class_labels": ["cat"]}, "class_labels must be among pipe.labels .*; got 'cat'"),
        ({"class_labels": [0], "output_type": "gif"}, "output_type must be 'pil', 'np' or 'pt'; got 'gif'"),
        ({"class_labels": [0], "guided_channels": "some"}, "guided_channels must be 'all' or 'three'; got 'some'"),
        ({"class_labels": [0], "guided_channels": "three"}, "this model has 1"),
    ],
)
def test_bad_arguments_are_reported(arguments: dict[str, Any], message: str, pixels: DyDiLiTPipeline) -> None:
    with pytest.raises(ValueError, match=message):
        pixels(**arguments)


def test_wrong_number_of_class_names_is_reported() -> None:
    model = network()
    with pytest.raises(ValueError, match="class_names must name the 10 classes; got 2 names"):
        DyDiLiTPipeline(model, scheduler_of(model.config, clip=True), size=8, class_names=["a", "b"])


# --- folders


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_saved_and_loaded_pipeline_draws_the_same(
    kind: str, pixels: DyDiLiTPipeline, latents: DyDiLiTPipeline, tmp_path: Path
) -> None:
    pipe = pixels if kind == "pixels" else latents
    pipe.save_pretrained(tmp_path / "pipe")
    assert not [path for path in tmp_path.rglob("*.*") if path.suffix not in (".json", ".safetensors", ".md")]
    loaded = quiet(DyDiLiTPipeline.from_pretrained(tmp_path / "pipe"))
    assert loaded.labels == pipe.labels and loaded.config["size"] == 8
    assert loaded.components.keys() == {"transformer", "scheduler", "vae"}
    assert not loaded.transformer.training
    first, second = (
        draws([2], num_inference_steps=3, generator=generators(1), output_type="pt").images for draws in (pipe, loaded)
    )
    assert torch.equal(first, second)
    loaded.save_pretrained(tmp_path / "again")  # loaded ones can be saved, too
    assert (tmp_path / "again" / "transformer" / "model.safetensors").exists()


def test_components_and_dtype_can_be_given(latents: DyDiLiTPipeline, tmp_path: Path) -> None:
    latents.save_pretrained(tmp_path)
    scheduler = DDIMScheduler.from_config(latents.scheduler.config)
    loaded = DyDiLiTPipeline.from_pretrained(tmp_path, scheduler=scheduler, torch_dtype=torch.bfloat16)
    assert loaded.scheduler is scheduler
    assert loaded.transformer.output.weight.dtype == loaded.vae.dtype == torch.bfloat16


def test_checkpoint_becomes_a_pipeline(tmp_path: Path) -> None:
    model = network()
    pipe = quiet(DyDiLiTPipeline.from_checkpoint(write_checkpoint(tmp_path / "run", model)))
    assert pipe.labels["digit 3"] == 3 and pipe.config["size"] == 8 and pipe.scheduler.config.clip_sample
    images = pipe([3], 2.0, 3, generator=generators(5), output_type="pt").images
    options = {"size": 8, "seeds": [5], "guidance": 2.0, "clip": True, "progress": False}
    expected = sample(model, torch.tensor([3]), steps=3, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(images.cpu() * 2 - 1, expected.clamp(-1, 1), atol=2e-4, rtol=0)
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = DyDiLiTPipeline.from_pretrained(tmp_path / "pipe")
    assert loaded.training == pipe.training and loaded.training["steps_done"] == 7
    assert loaded.labels == pipe.labels


def test_vae_of_a_checkpoint(tmp_path: Path) -> None:
    vae().save_pretrained(tmp_path / "vae")
    vae(latent_channels=2).save_pretrained(tmp_path / "narrow")
    described = {"kind": "latents", "channels": 4, "scaling_factor": 0.5, "vae": str(tmp_path / "vae")}
    folder = write_checkpoint(tmp_path / "run", network(in_channels=4), **described)
    for given in (None, tmp_path / "vae", vae()):
        pipe = DyDiLiTPipeline.from_checkpoint(folder, vae=given)
        assert pipe.vae is not None and not pipe.vae.training and not pipe.scheduler.config.clip_sample
    with pytest.raises(ValueError, match=r"vae must have 4 latent channels .*; got 2 and 0\.5"):
        DyDiLiTPipeline.from_checkpoint(folder, vae=tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"vae must have .* scaling factor 0\.5, as in training; got 4 and 0\.2"):
        DyDiLiTPipeline.from_checkpoint(folder, vae=vae(scaling_factor=0.2))
    with pytest.raises(DataError, match="cannot load the VAE"):
        DyDiLiTPipeline.from_checkpoint(folder, vae=str(tmp_path / "nothing"))
    digits = write_checkpoint(tmp_path / "digits", network())
    with pytest.raises(ValueError, match="vae must be None for a model of digits"):
        DyDiLiTPipeline.from_checkpoint(digits, vae=vae())
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        DyDiLiTPipeline.from_checkpoint(tmp_path)


def test_fused_transformer_is_not_saved(pixels: DyDiLiTPipeline, tmp_path: Path) -> None:
    options = {"num_inference_steps": 2, "output_type": "pt"}
    before = pixels([1], generator=generators(0), **options).images
    pixels.transformer.fuse()
    torch.testing.assert_close(pixels([1], generator=generators(0), **options).images, before, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="transformer must not be fused"):
        pixels.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()


def save_weights(model: DiffusionTransformer, folder: Path) -> None:
    save_model(model, str(folder / "transformer" / "model.safetensors"))


def edit_index(folder: Path, **changes: object) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **changes}))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda folder: (folder / "model_index.json").unlink(),
            "there is no model_index.json; DyDiLiTPipeline.from_ch",
        ),
        (
            lambda folder: edit_index(folder, _class_name="DiTPipeline"),
            "must hold a DyDiLiTPipeline; got a DiTPipeline",
        ),
        (
            lambda folder: edit_index(folder, scheduler=["os", "system"]),
            "the scheduler of .* of diffusers; got one of os",
        ),
        (lambda folder: edit_index(folder, vae=["evil", "Vae"]), "the vae of .* must be a class of diffusers"),
        (lambda folder: (folder / "transformer" / "model.safetensors").unlink(), "cannot load the transformer"),
        (lambda folder: (folder / "transformer" / "model.safetensors").write_bytes(b"short"), "cannot load the tran"),
        (lambda folder: (folder / "transformer" / "config.json").write_text("{}"), "not the configuration of a model"),
        (lambda folder: save_weights(network(dim=16), folder), "cannot load the transformer"),
    ],
)
def test_damaged_or_foreign_folders_are_refused(
    spoil: Callable[[Path], object], message: str, pixels: DyDiLiTPipeline, tmp_path: Path
) -> None:
    pixels.save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        DyDiLiTPipeline.from_pretrained(tmp_path)


def test_nothing_in_a_folder_is_executed(pixels: DyDiLiTPipeline, tmp_path: Path) -> None:
    pixels.save_pretrained(tmp_path)
    for name in ("pipeline.py", "DyDiLiTPipeline.py", "transformer/model.py", "scheduler/scheduler.py"):
        (tmp_path / name).write_text("raise SystemExit('executed')")
    DyDiLiTPipeline.from_pretrained(tmp_path)
    for option in ({"trust_remote_code": True}, {"custom_pipeline": str(tmp_path)}):
        with pytest.raises(ValueError, match="never runs code of a folder"):
            DyDiLiTPipeline.from_pretrained(tmp_path, **option)
    with pytest.raises(ValueError, match="safe_serialization is always on"):
        pixels.save_pretrained(tmp_path, safe_serialization=False)


# --- the Hub


def test_push_uploads_what_is_saved(pixels: DyDiLiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, dict[str, Any]] = {}

    class Recorder:
        def __init__(self, token: str | None) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
            calls["create"] = {"repo_id": repo_id, **options}
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, folder_path: str, **options: Any) -> str:
            files = {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()}
            calls["upload"] = {**options, "files": files}
            return "https://hub/commit"

    monkeypatch.setattr(pipeline, "HfApi", Recorder)
    assert pixels.push_to_hub("digits", private=True, token="secret", commit_message="first") == "https://hub/commit"
    assert calls["create"] == {"repo_id": "digits", "private": True, "exist_ok": True}
    pixels.save_pretrained(tmp_path)
    saved = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert calls["upload"] == {
        "repo_id": "me/digits", "commit_message": "first", "create_pr": False, "files": saved,
    }  # fmt: skip


def test_a_name_is_downloaded_without_code(
    pixels: DyDiLiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels.save_pretrained(tmp_path)
    asked: dict[str, Any] = {}

    def download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(pipeline, "snapshot_download", download)
    loaded = DyDiLiTPipeline.from_pretrained("me/digits", revision="v1", token="secret")
    assert loaded.labels == pixels.labels
    assert (asked["repo_id"], asked["revision"], asked["token"]) == ("me/digits", "v1", "secret")
    assert not [pattern for pattern in asked["allow_patterns"] if pattern.endswith(("*", ".py", ".bin"))]


# --- the model card


def test_card_of_a_bare_model(tmp_path: Path) -> None:
    network().save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "dydila-kernels"
    assert 'DiffusionTransformer.from_pretrained("FOLDER")' in card.text
    assert "## Training" not in card.text and "arxiv.org/abs/2601.13683" in card.text


def test_card_of_a_checkpoint_tells_of_the_training(tmp_path: Path) -> None:
    model = network()
    model.save_pretrained(tmp_path, model_card_kwargs=card_kwargs(training_of(model)))
    text = ModelCard.load(tmp_path / "README.md").text
    assert "# DyDi-LiT tiny" in text and 'DyDiLiTPipeline.from_checkpoint("FOLDER")' in text
    assert "after 7 steps" in text and "8x8 pixels with\n1 channel, of 10 classes" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "| train.learning_rate | 0.0001 |" in rows and "| model.dim | 32 |" in rows and "| torch | 2.13 |" in rows
    assert r"| train.note | a \| b c |" in rows
    first = text.splitlines().index(rows[0])
    assert text.splitlines()[first : first + len(rows)] == rows  # one table, without gaps
    assert "/home/me" not in text  # where the run lay is nobody's business


def test_card_of_a_pipeline(tmp_path: Path) -> None:
    pipe = DyDiLiTPipeline.from_checkpoint(write_checkpoint(tmp_path / "run", network()))
    pipe.save_pretrained(tmp_path / "pipe")
    card = ModelCard.load(tmp_path / "pipe" / "README.md")
    assert card.data.library_name == "diffusers"
    assert 'DyDiLiTPipeline.from_pretrained("FOLDER")' in card.text and "| steps | 7 |" in card.text
