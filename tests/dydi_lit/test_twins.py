"""Textures with twins: what is in the images, and the errors that frame what a denoiser can do with them."""

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("examples.dydi_lit")

from torch import Tensor

from examples.dydi_lit import ladder
from examples.dydi_lit.configs import config_of
from examples.dydi_lit.data import DataError, open_data
from examples.dydi_lit.diffusion import alpha_bars
from examples.dydi_lit.ladder import LadderConfig
from examples.dydi_lit.model import DiffusionTransformer
from examples.dydi_lit.settings import TrainConfig
from examples.dydi_lit.train import model_config_of
from examples.dydi_lit.twins import GRID, TILE, TRAINING, TwinData, bounds, twins


def tiles_of(images: Tensor) -> Tensor:
    """(n, 1, 32, 32) -> (n, 64, 16), one tile after the other."""
    return torch.stack(
        [
            images[:, 0, TILE * (t // GRID) :, TILE * (t % GRID) :][:, :TILE, :TILE].flatten(1)
            for t in range(GRID**2)
        ],
        1,
    )  # fmt: skip


def test_every_tile_has_one_twin_anywhere() -> None:
    images, partners = twins(1000, 3)
    assert images.shape == (1000, 1, 32, 32) and set(images.unique().tolist()) == {-1, 1}
    assert (partners.sort(1).values == torch.arange(64)).all()
    assert (partners != torch.arange(64)).all() and (partners.gather(1, partners) == torch.arange(64)).all()
    tiles = tiles_of(images)
    assert torch.equal(tiles, tiles.gather(1, partners[..., None].expand_as(tiles)))
    assert images.float().mean().abs() < 0.02  # a fair coin's
    offsets = (partners - torch.arange(64)).flatten().unique()
    assert len(offsets) == 126  # all from -63 to 63 but 0
    assert not torch.equal(images, twins(1000, 4)[0]) and torch.equal(images, twins(1000, 3)[0])


def test_the_frame_is_that_of_the_posterior() -> None:
    """Against the posterior of a pixel by Bayes' rule from its two likelihoods, and by that of both observations."""
    images, partners = (part[:8] for part in twins(8, 5))
    clean = images.double()
    noise = torch.randn(clean.shape, dtype=torch.float64)
    bar = 0.6
    noisy = math.sqrt(bar) * clean + math.sqrt(1 - bar) * noise
    own = tiles_of(noisy)
    other = own.gather(1, partners[..., None].expand_as(own))
    errors = []
    for seen in ((own,), (own, other)):
        logs = [
            sum(-((x - sign * math.sqrt(bar)) ** 2) / (2 * (1 - bar)) for x in seen) for sign in (1, -1)
        ]  # fmt: skip
        mean = 2 * torch.softmax(torch.stack(logs), 0)[0] - 1  # type: ignore[arg-type]
        error = ((own - math.sqrt(bar) * mean) / math.sqrt(1 - bar) - tiles_of(noise)).square().mean().item()
        errors.append(error)
    assert bounds(noisy, noise, partners, bar) == pytest.approx(errors)
    assert errors[1] < errors[0] < bar / (1 - bar)  # the last is a guess of 0


def test_held_out_images_are_framed_and_not_those_of_training() -> None:
    held_out = ladder.held_out("twins")
    trained = {image.numpy().tobytes() for image in TwinData().images}
    assert len(trained) == TRAINING and not any(i.to(torch.int8).numpy().tobytes() in trained for i in held_out.images)
    alone, paired = ladder.frame(held_out)
    assert 0.9 * alone > paired > 0

    class Best(torch.nn.Module):
        """Sees each pixel alone."""

        def forward(self, noisy: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
            bar = float(alpha_bars()[int(timesteps[0])])
            return (noisy - math.sqrt(bar) * torch.tanh(math.sqrt(bar) * noisy / (1 - bar))) / math.sqrt(1 - bar)

    assert ladder.held_out_error(Best(), held_out) == pytest.approx(alone, rel=1e-5)  # type: ignore[arg-type]


def test_a_tile_is_a_token() -> None:
    data = open_data("twins", None, None)
    config = model_config_of(TrainConfig(size="toy", data="twins", learn_sigma=False), data)
    assert (config.patch_size, config.in_channels, config.num_classes) == (TILE, 1, 1)
    assert config == config_of(
        "dydi-lit", "toy", patch_size=TILE, feed_forward="mlp", ffn_ratio=4.0, in_channels=1, num_classes=1,
        learn_sigma=False,
    )  # fmt: skip
    item, label = data[3]
    batch = torch.stack([item, item])
    images = data.to_images(batch, torch.tensor([False, True]), torch.empty(0))
    assert label == 0 and images.dtype == torch.float32 and torch.equal(images[0].flip(-1), images[1])
    noise = DiffusionTransformer(config)(images, torch.tensor([3, 3]), torch.tensor([0, 0]))
    assert noise.shape == images.shape


@pytest.mark.parametrize("path, size", [(Path("somewhere"), None), (None, 32)])
def test_what_is_drawn_has_neither_path_nor_size(path: Path | None, size: int | None) -> None:
    with pytest.raises(DataError, match="twins are drawn, without a path or an image size"):
        open_data("twins", path, size)


@pytest.mark.slow
def test_a_ladder_on_twins_prints_its_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LadderConfig(output=tmp_path, data="twins", models=("sana",), seeds=1, steps=2, workers=1)
    monkeypatch.setattr("tyro.cli", lambda *arguments, **options: config)
    ladder.main()
    printed = capsys.readouterr().out
    assert "| Sana | 1 |" in printed and "pixels alone: 121.2; every twin known: 64.6" in printed
