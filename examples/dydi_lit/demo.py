"""Trains, samples and scores a tiny DyDi-LiT in a few minutes on a CPU: python -m examples.dydi_lit.demo"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from examples.dydi_lit.checkpoint import plain_errors, read_training
from examples.dydi_lit.plots import as_text
from examples.dydi_lit.recorder import Diverged
from examples.dydi_lit.sample import SampleConfig, draw_grid
from examples.dydi_lit.score import ScoreConfig, print_scores, score
from examples.dydi_lit.settings import SettingsError, from_json
from examples.dydi_lit.train import Interrupted, TrainConfig, train


@dataclass(frozen=True)
class DemoConfig:
    """Train a tiny DyDi-LiT on digits, draw a grid of samples and score it: minutes on two CPU cores."""

    output: Path = Path("runs/demo")
    """Folder that receives checkpoint/, samples.png and loss.png."""
    steps: int = TrainConfig.steps
    """Training steps; fewer are faster and worse."""
    seed: int = TrainConfig.seed
    """Seed of the training run."""
    resume: bool = False
    """Continue the interrupted run in the output folder."""


def demo(config: DemoConfig) -> None:
    """Runs the whole demonstration; raises what `train` raises."""
    started = time.perf_counter()
    train_config = TrainConfig(output=config.output, steps=config.steps, seed=config.seed)
    if config.resume:
        stopped = config.output / "checkpoint"
        train_config = replace(from_json(read_training(stopped)["train"]), output=config.output, resume=stopped)
    checkpoint = train(train_config)
    trained = time.perf_counter()

    grid = config.output / "samples.png"
    drawing = SampleConfig(checkpoint, output=grid)
    print(as_text(draw_grid(drawing)[:: drawing.per_class]))
    print_scores(score(ScoreConfig(checkpoint)))
    print(f"{trained - started:.0f} s of training, {time.perf_counter() - trained:.0f} s of sampling and scoring")
    print(f"samples {grid}, loss curve {config.output / 'loss.png'}, checkpoint {checkpoint}")


def main() -> None:
    config = tyro.cli(DemoConfig, prog="python -m examples.dydi_lit.demo")
    with plain_errors(SettingsError, Diverged):
        try:
            demo(config)
        except Interrupted as stop:
            command = f"python -m examples.dydi_lit.demo --output {config.output} --resume"
            raise SystemExit(f"{stop}; resume with: {command}") from None


if __name__ == "__main__":
    main()
