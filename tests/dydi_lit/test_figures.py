"""Grids, text and curves; what is seen of a model while it draws; the figures of the paper."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("examples.dydi_lit")

from torch import Tensor, nn

from dydila_kernels import DyDiLAttention, reference
from dydila_kernels.testing import with_distinct_factors
from examples.dydi_lit import figures
from examples.dydi_lit.configs import TITLES, Model, config_of, to_json
from examples.dydi_lit.figures import FiguresConfig
from examples.dydi_lit.inspection import Usage, attention_layers, attention_maps, lambdas_of, watching
from examples.dydi_lit.model import DiffusionTransformer
from examples.dydi_lit.plots import as_text, save_grid, save_loss_curve, save_loss_curves


def small(model: Model, **changes: object) -> DiffusionTransformer:
    """A model whose weights are random throughout, and whose tables hold different factors."""
    options = {"dim": 32, "depth": 2, "in_channels": 1, "num_classes": 10, **changes}
    network = DiffusionTransformer(config_of(model, "tiny", **options)).eval()
    for name, weight in network.named_parameters():
        if name.startswith("output") or "modulation" in name:
            nn.init.normal_(weight, std=0.2)
    for layer in attention_layers(network):
        if isinstance(layer, DyDiLAttention):
            with_distinct_factors(layer)
    return network


def checkpoint(folder: Path, model: Model, **data: object) -> Path:
    """What the figures need of a checkpoint."""
    described = {"kind": "digits", "channels": 1, "size": 8, "class_names": [str(digit) for digit in range(10)], **data}
    network = small(model, in_channels=described["channels"])
    network.save_pretrained(folder)
    training = {
        "steps_done": 3,
        "train": {"model": model, "size": "tiny"},
        "model": to_json(network.config),
        "data": {**described, "num_classes": 10},
        "versions": {},
    }
    (folder / "training.json").write_text(json.dumps(training))
    (folder / "losses.json").write_text(json.dumps([1.0, 0.5, 0.25]))
    return folder


# --- plots


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_shows_every_pixel(channels: int, tmp_path: Path) -> None:
    images = torch.rand(7, channels, 130, 130) * 2 - 1
    save_grid(images, tmp_path / "new" / "grid.png", columns=3)
    shown = np.asarray(Image.open(tmp_path / "new" / "grid.png").convert("RGB")).astype(int)
    assert shown.shape == (3 * 130 + 2 * 8, 3 * 130 + 2 * 8, 3)
    expected = ((images + 1) / 2 * 255).round().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    assert np.abs(shown[:130, :130] - expected[0]).max() <= 1
    assert np.abs(shown[138:268, 276:] - expected[5]).max() <= 1
    assert (shown[276:, 138:] == 255).all()  # no image there


def test_grid_has_titles_and_cuts_values(tmp_path: Path) -> None:
    save_grid(torch.full((4, 1, 8, 8), -7.0), tmp_path / "plain.png", columns=2)
    save_grid(torch.full((4, 1, 8, 8), -1.0), tmp_path / "titled.png", columns=2, titles=["tench", "goldfish"])
    plain, titled = (np.asarray(Image.open(tmp_path / name).convert("L")) for name in ("plain.png", "titled.png"))
    assert (plain[:60, :60] == 0).all()
    margin = titled.shape[1] - plain.shape[1]
    assert margin > 0 and titled.shape[0] == plain.shape[0]
    assert (titled[:60, : margin - 2] < 128).any()  # letters
    assert (titled[:, 0] == 255).all()  # none is cut off


def test_grid_has_headings(tmp_path: Path) -> None:
    images = torch.full((8, 1, 64, 64), -1.0)
    save_grid(images, tmp_path / "plain.png", columns=4)
    save_grid(images, tmp_path / "headed.png", columns=4, headings=["tench", "goldfish"])
    plain, headed = (np.asarray(Image.open(tmp_path / name).convert("L")) for name in ("plain.png", "headed.png"))
    margin = headed.shape[0] - plain.shape[0]
    assert margin > 0 and headed.shape[1] == plain.shape[1]
    written = (headed[:margin] < 128).any(0).nonzero()[0]
    left = written[written < headed.shape[1] / 2]
    assert abs((left[0] + left[-1]) / 2 - headed.shape[1] / 4) < 5  # over the middle of the first two columns
    with pytest.raises(ValueError, match="headings must divide the 4 columns; got 3"):
        save_grid(images, tmp_path / "x.png", columns=4, headings=["a", "b", "c"])


@pytest.mark.parametrize("name", [r"$\frac$", "a $ and a", r"\$ \frac", os.fsdecode(b"caf\xe9"), "_x^{"])
def test_any_name_can_be_written(name: str, tmp_path: Path) -> None:
    """Nothing is a formula, and bytes that are no UTF-8 do not stop it."""
    save_grid(torch.zeros(2, 1, 8, 8), tmp_path / "grid.png", columns=1, titles=[name, name])
    save_loss_curves({name: [1.0, 2.0], "other": [1.0, 2.0]}, tmp_path / "loss.png")


def test_every_figure_takes_any_name(tmp_path: Path) -> None:
    """Of a class, and of a folder that has to tell two models apart."""
    names = [r"$\frac$", os.fsdecode(b"caf\xe9")] * 5
    folder = checkpoint(tmp_path / r"a$\frac$", "dydi-lit", class_names=names)
    config = FiguresConfig(folder, output=tmp_path / "figures", compare=(folder,), classes=(0, 1), per_class=1, steps=1)
    assert len(figures.draw(config)) == 4


@pytest.mark.parametrize(
    "images, titles, message",
    [
        (torch.zeros(2, 4, 8, 8), None, r"images must be \(n, 1 or 3, .*got \(2, 4, 8, 8\)"),
        (torch.zeros(0, 1, 8, 8), None, "n at least 1"),
        (torch.zeros(4, 1, 8, 8), ["one"], "each of the 2 rows; got 1"),
    ],
)
def test_grid_reports_bad_arguments(images: Tensor, titles: list[str] | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_grid(images, tmp_path / "grid.png", columns=2, titles=titles)
    assert not list(tmp_path.iterdir())


def test_digits_as_text() -> None:
    black, white = -torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 3)
    row = "██" * 3 + " " * 3 + "  " * 3
    assert as_text(torch.cat([white, black, white]), columns=2) == "\n".join([row, row, "██" * 3, "██" * 3])


def test_loss_curves_are_written(tmp_path: Path) -> None:
    save_loss_curve([1.0 / step for step in range(1, 80)], tmp_path / "new" / "one.png")
    save_loss_curves({"a": [1.0, 0.5], "b": [1.0 / step for step in range(1, 80)]}, tmp_path / "two.png")
    assert Image.open(tmp_path / "new" / "one.png").size == Image.open(tmp_path / "two.png").size == (840, 480)


# --- what is seen


def test_usage_counts_the_decisions_of_each_class() -> None:
    model, usage, seen = small("dydi-lit"), Usage(), []
    labels = torch.tensor([3, 5, 3, model.null_class])

    def see(block: int, layer: nn.Module, x: Tensor, timesteps: Tensor, given: Tensor) -> None:
        assert isinstance(layer, DyDiLAttention)
        usage.add(block, layer, x, given, 10)
        seen.append((block, layer.routing(x).indices["projection_q"], timesteps))

    with torch.no_grad():
        with watching(model, see):
            model(torch.randn(4, 1, 8, 8), torch.tensor([900, 900, 900, 900]), labels)
        model(torch.randn(4, 1, 8, 8), torch.tensor([1, 1, 1, 1]), labels)  # no longer watched
    assert [block for block, *_ in seen] == [0, 1]
    shares = usage.shares("projection_q", [5, 3])
    assert shares.shape == (2, 2, 3)
    for block, index, timesteps in seen:
        assert timesteps[0] == 900
        for place, images in ((0, [1]), (1, [0, 2])):
            expected = torch.bincount(index[images].flatten(), minlength=3) / (16 * len(images))
            torch.testing.assert_close(shares[block, place].float(), expected)
    assert usage.shares("projection_q", [7]).isnan().all()
    with pytest.raises(KeyError):
        usage.shares("no_router", [5])


def test_hooks_are_removed_after_an_error() -> None:
    model = small("sana")
    with pytest.raises(RuntimeError), watching(model, lambda *_: None):
        raise RuntimeError
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("heads", [1, 2])
def test_last_map_is_the_attention_of_the_layer(heads: int) -> None:
    """The map of the token differential, times V, is what the equations make of the query token."""
    layer = DyDiLAttention(16, heads, dwc_branches=(), lambda_init=0.3).double()
    with_distinct_factors(layer)
    x, query = torch.randn(20, 16, dtype=torch.float64), 7
    maps = attention_maps(layer, x, query)
    assert len(maps) == 4
    if heads == 1:
        q, k, v = layer.qkv(x[None]).chunk(3, -1)
        out = reference.dydila_attention(
            q, k, v, layer.projection_q(x[None]), layer.projection_k(x[None]),
            gamma=layer.measure.gamma, lam=layer.differential.lam, kernel_routers=layer.measure.routers(),
            differential_routers=layer.differential.routers(),
        )[0, query]  # fmt: skip
        ours = maps[-1].weights @ v[0]
        assert torch.nn.functional.cosine_similarity(ours, out, dim=0) > 1 - 1e-12
    for shown in maps:
        assert shown.weights.shape == (20,)
        torch.testing.assert_close(shown.weights.abs().sum(), torch.tensor(1.0, dtype=torch.float64))
        assert 0 < shown.entropy <= 1 and 0.1 <= shown.largest_tenth <= 1


@pytest.mark.parametrize(
    "model, titles",
    [
        ("dit", ["softmax attention"]),
        ("moh-dit", ["softmax attention"]),
        ("sana", ["linear attention"]),
        ("lit", ["linear attention"]),
        ("edit", []),
        ("dig", []),
        ("focused-kernel", ["linear attention", "dynamic measure kernel"]),
        ("dynamic-projection", ["linear attention", "dynamic projection", "dynamic measure kernel"]),
        ("map-differential", ["linear attention", "dynamic measure kernel", "redundancy", "map differential"]),
        ("dydi-lit", ["linear attention", "dynamic measure kernel", "redundancy", "token differential"]),
    ],
)
def test_every_model_has_the_maps_of_its_components(model: Model, titles: list[str]) -> None:
    layer = attention_layers(small(model))[0]
    maps = attention_maps(layer, torch.randn(16, 32), 3)
    assert len(maps) == len(titles)
    assert all(shown.title.startswith(title) for shown, title in zip(maps, titles, strict=True))
    assert all((shown.weights >= 0).all() for shown in maps if "differential" not in shown.title)


def test_map_of_dit_is_its_softmax() -> None:
    layer = attention_layers(small("dit", num_heads=4))[0]
    x = torch.randn(16, 32)
    q, k, _ = layer.qkv(x).chunk(3, -1)  # type: ignore[operator]
    heads = [(q[3, part] @ k[:, part].T / 8**0.5).softmax(-1) for part in torch.arange(32).view(4, 8)]
    torch.testing.assert_close(attention_maps(layer, x, 3)[0].weights, torch.stack(heads).mean(0).detach())


def test_evenness_of_maps() -> None:
    layer = attention_layers(small("sana"))[0]
    even = attention_maps(layer, torch.ones(20, 32), 0)[0]
    assert even.entropy == pytest.approx(1) and even.largest_tenth == pytest.approx(0.1)
    dead = attention_maps(layer, torch.zeros(20, 32), 0)[0]  # no positive entry in Q or K
    assert not dead.weights.any()


def test_lambdas_are_weighted_by_use() -> None:
    model, usage = small("dydi-lit"), Usage()
    assert lambdas_of(small("sana"), usage, [0]) == []
    for layer in attention_layers(model):
        layer.differential.lam.data = torch.arange(9.0)  # type: ignore[union-attr]
    names = ("differential_q", "differential_k")
    for block in range(2):
        for name, choice in zip(names, (2, 4), strict=True):
            usage.counts[name][block] = torch.nn.functional.one_hot(torch.full((10,), choice + block), 9)
    first, second = lambdas_of(model, usage, [0, 4])
    assert (first.mean, first.least, first.greatest, first.used) == (4, 0, 8, 3)
    assert second.used == 4


# --- the command


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["figures", *map(str, arguments)])
    figures.main()


def test_figures_of_a_model_beside_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = checkpoint(tmp_path / "a", "dydi-lit"), checkpoint(tmp_path / "b", "sana")
    options = ["--steps", 2, "--per-class", 1, "--classes", 7, "--output", tmp_path / "out"]
    run(monkeypatch, first, *options, "--compare", second)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "loss.png", "maps.png", "routing.png", "lambda.png",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "left out of lambda.png: Sana, tiny (no differential factors)" in printed
    assert f"wrote {tmp_path / 'out' / 'loss.png'}" in printed


@pytest.mark.parametrize("model", ["dit", "dynamic-projection", "dig"])
def test_models_without_a_part_leave_its_figure_out(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path / "run", model)
    drawn = figures.draw(FiguresConfig(folder, tmp_path / "out", classes=(0,), per_class=1, steps=1))
    names = {path.name for path in drawn}
    has = {"dit": {"maps.png"}, "dynamic-projection": {"maps.png", "routing.png"}, "dig": set()}[model]
    assert names == {"loss.png"} | has
    printed = capsys.readouterr().out
    assert all((f"left out: {name}" in printed) == (name not in has) for name in ("maps.png", "routing.png"))
    assert all(path.stat().st_size > 0 for path in drawn)


def test_study_watches_the_chosen_token(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "run", "dydi-lit")
    options = {"classes": (4,), "per_class": 2, "steps": 10}
    seen = figures.study(folder, FiguresConfig(folder, block=1, query=(0, 3), timestep=520, **options))  # type: ignore
    assert (seen.block, seen.query, seen.grid, seen.timestep) == (1, (0, 3), (4, 4), 499)
    assert seen.title == f"{TITLES['dydi-lit']}, tiny"
    counted = seen.usage.counts["projection_q"]
    assert counted[0].sum() == counted[1].sum() == 10 * 2 * 16  # steps, images, tokens: guidance's null half is not in
    assert counted[0].sum(1)[4] == 10 * 2 * 16
    again = figures.study(folder, FiguresConfig(folder, **options))  # type: ignore[arg-type]
    assert (again.block, again.query, again.timestep) == (1, (2, 2), 99)
    assert torch.equal(again.drawn, seen.drawn)


def test_latents_without_a_vae_leave_the_image_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = str(tmp_path / "no-vae")
    folder = checkpoint(tmp_path / "run", "sana", kind="latents", channels=4, scaling_factor=0.18, vae=nowhere)
    options = {"classes": (0,), "per_class": 1, "steps": 1}
    figures.draw(FiguresConfig(folder, tmp_path / "out", **options))  # type: ignore[arg-type]
    assert "left out: the image beside the attention maps (cannot load the VAE" in capsys.readouterr().out
    with pytest.raises(figures.DataError, match="cannot load the VAE"):
        figures.draw(FiguresConfig(folder, tmp_path / "out", vae=nowhere, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--classes", 3, 12], r"classes must be in 0\.\.9; got \(3, 12\)"),
        (["--block", 2], r"block must be in 0\.\.1; got 2"),
        (["--query", 0, 4], r"query must be a row and a column in 0\.\.3; got \(0, 4\)"),
        (["--steps", 0], "steps must be"),
    ],
)
def test_bad_options_are_one_line(
    arguments: list[object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "run", "dydi-lit")
    with pytest.raises(SystemExit, match=f"error: {message}"):
        run(monkeypatch, folder, *arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_number_of_images_is_checked() -> None:
    with pytest.raises(ValueError, match="per_class must be at least 1; got 0"):
        FiguresConfig(Path("run"), per_class=0)


def test_missing_checkpoint_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"error: no checkpoint at .*nowhere"):
        run(monkeypatch, tmp_path / "nowhere")


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--help")
    assert ended.value.code == 0 and "--query" in capsys.readouterr().out
