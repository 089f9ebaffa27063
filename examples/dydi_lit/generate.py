"""Draws many images for evaluation into one .npz: python -m examples.dydi_lit.generate CHECKPOINT

The file is what OpenAI's ADM evaluator reads (guided-diffusion, folder evaluations): `arr_0` (n, height, width, 3)
uint8, and beside it, as ADM writes them, the labels `arr_1` (n,) int64. Image i is of class i % num_classes, so each
class has its share in any long run of images, as the evaluator needs, which computes the inception score of 5000
images at a time. OUTPUT.json tells which model drew them, and how. With several processes, on machines that share the
folder:

    accelerate launch -m examples.dydi_lit.generate CHECKPOINT

Images are drawn in batches of fixed numbers, dealt out to the processes, and a finished batch is written to a folder
beside the output. Hence a stopped run goes on where it was, and the bytes of the result do not depend on the number of
processes. Another batch size draws the same images, but for the rounding of sums taken in another order.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from huggingface_hub.utils.sha import sha_fileobj
from tqdm import tqdm

from examples.dydi_lit.checkpoint import CheckpointError, plain_errors
from examples.dydi_lit.data import to_uint8
from examples.dydi_lit.diffusion import Sampler, seeds_of
from examples.dydi_lit.drawing import DrawConfig, Drawer
from examples.dydi_lit.npz import save_npz
from examples.dydi_lit.parallel import processes


@dataclass(frozen=True)
class GenerateConfig(DrawConfig):
    """Draw images of all classes alike from a trained model into an .npz for OpenAI's ADM evaluator.

    A run that was stopped goes on where it was when the same command is given again. The defaults are DiT's; Sub-IN's
    figures in the paper take --samples 30000 --steps 200.
    """

    output: Path = Path("runs/samples.npz")
    """File to write; finished batches are kept in the folder OUTPUT.parts meanwhile."""
    samples: int = 50_000
    """Images to draw, evenly over the classes; the first classes have one more where it does not divide."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 is none."""
    sampler: Sampler = "ddpm"
    """The paper's "ddpm", or "ddim" or "dpm-solver++", which make do with fewer steps."""
    steps: int = 250
    """Steps of the sampler, at most 1000."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1; got {self.samples}")
        if self.output.suffix != ".npz":
            raise ValueError(f"output must be a file called *.npz; got {self.output}")

    @property
    def batches(self) -> list[range]:
        """The numbers of the images of each batch."""
        return [
            range(first, min(first + self.batch_size, self.samples))
            for first in range(0, self.samples, self.batch_size)
        ]


def generate(config: GenerateConfig) -> Path:
    """Draws the batches that are not there yet, and joins them all into `config.output`.

    Raises what `Drawer` raises, and CheckpointError where batches of other settings are in the way.
    """
    state = processes()
    draw = Drawer(config)
    num_classes = draw.data["num_classes"]
    parts = config.output.with_name(config.output.name + ".parts").resolve()  # a link cannot be removed as a folder
    settings = settings_of(config, draw)
    if state.is_main_process:
        prepare_parts(parts, settings)
    state.wait_for_everyone()
    check_parts(parts, settings)

    mine = range(state.process_index, len(config.batches), state.num_processes)
    for number in tqdm(mine, unit="batch", desc="generate", disable=not state.is_main_process):
        if not part_file(parts, number).exists():
            indices = config.batches[number]
            labels = torch.tensor(indices) % num_classes
            images = to_uint8(draw(labels, seeds_of(config.seed, indices), progress=state.is_main_process))
            save_part(part_file(parts, number), np.broadcast_to(images, (*images.shape[:3], 3)))
    state.wait_for_everyone()

    if state.is_main_process:
        labels = np.arange(config.samples, dtype=np.int64) % num_classes
        numbers = tqdm(range(len(config.batches)), unit="batch", desc="join")
        save_npz(config.output, (np.load(part_file(parts, number)) for number in numbers), labels)
        describe(config, draw, settings)
        shutil.rmtree(parts)
    return config.output


def settings_of(config: GenerateConfig, draw: Drawer) -> dict[str, Any]:
    """All that the bytes of a batch depend on, in JSON's types."""
    settings = {name: value for name, value in asdict(config).items() if name not in ("checkpoint", "output")}
    with (config.checkpoint / "model.safetensors").open("rb") as weights:
        settings["weights_sha256"] = sha_fileobj(weights).hex()
    return {**settings, "vae": config.vae or draw.data.get("vae"), "device": draw.device.type}


def describe(config: GenerateConfig, draw: Drawer, settings: dict[str, Any]) -> None:
    """Writes OUTPUT.json: which model drew the images, and how, for `evaluate` and `tables`."""
    training = draw.training
    trained = {name: training["train"].get(name) for name in ("model", "size", "seed")}
    told = {**settings, **trained, "drawing_seed": config.seed, "trained_steps": training["steps_done"]}
    file = config.output.with_name(config.output.name + ".json")
    file.write_text(json.dumps({**told, "data": draw.data}, indent=2) + "\n")


def prepare_parts(parts: Path, settings: dict[str, Any]) -> None:
    """Makes the folder of finished batches, if it is not there."""
    parts.mkdir(parents=True, exist_ok=True)
    file = parts / "settings.json"
    if not file.exists():
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(settings, indent=2) + "\n")
        os.replace(partial, file)


def check_parts(parts: Path, settings: dict[str, Any]) -> None:
    """Raises CheckpointError where the folder holds batches of other settings, naming those that differ."""
    found = json.loads((parts / "settings.json").read_text())
    if differ := [name for name in settings if found.get(name) != settings[name]]:
        changes = ", ".join(f"{name} {found.get(name)!r} instead of {settings[name]!r}" for name in differ)
        raise CheckpointError(
            f"{parts} holds batches of an unfinished run with {changes}; finish that run, delete the folder or choose "
            "another --output"
        )


def part_file(parts: Path, number: int) -> Path:
    return parts / f"batch-{number:06}.npy"


def save_part(file: Path, images: np.ndarray) -> None:
    """Writes a batch, whole or not at all."""
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.save(stream, images)
    os.replace(partial, file)


def main() -> None:
    with plain_errors(ValueError):
        config = tyro.cli(GenerateConfig, prog="python -m examples.dydi_lit.generate")
        try:
            generate(config)
        except KeyboardInterrupt:
            raise SystemExit("interrupted; give the same command again to go on") from None
    if processes().is_main_process:
        print(f"wrote {config.output}")


if __name__ == "__main__":
    main()
