"""A swap is repeated from its recipe, which JSON holds: saved models, pipelines, and recipes that are malformed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

from dydila_kernels import repeat_replacement, replace_attention
from tests.models import SHAPE, ViT, diffusers, new_layers, output, random_convolutions, sana
from tests.zoo import MODELS, by_name, sana_video

load_file = pytest.importorskip("safetensors.torch").load_file


def by_json(recipe: dict[str, Any]) -> Any:
    return json.loads(json.dumps(recipe, allow_nan=False))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"include": "blocks.1", "lambda_init": 0.0, "num_heads": 2},
        {"exclude": 0, "HW": (4, 4), "qk_norm": "layer", "dwc_branches": ("3x3", "identity")},
        {"dwc_branches": (), "differential": "off", "num_projectors": 0, "num_prefix_tokens": 1},
        {"num_projectors": torch.tensor([2]).numpy()[0], "gamma_init": torch.ones(1).numpy()[0], "backend": "torch"},
    ],
    ids=str,
)
def test_a_recipe_repeats_the_swap(arguments: dict[str, Any]) -> None:
    model = ViT().eval()
    report = replace_attention(model, **arguments)
    fresh = ViT().eval()
    again = repeat_replacement(fresh, by_json(report.recipe()))
    assert [layer.name for layer in again.swapped] == [layer.name for layer in report.swapped]
    assert again.recipe() == report.recipe()
    assert str(again).splitlines()[:2] == str(report).splitlines()[:2]
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(output(fresh), output(model))
    again.undo()
    assert not new_layers(fresh)


def test_a_function_of_the_arguments_has_to_be_given_again() -> None:
    def grid(x: torch.Tensor, **_: Any) -> tuple[int, int]:
        return x.shape[2] // 2, x.shape[3] // 2

    recipe = by_json(replace_attention(ViT(), HW=grid).recipe())
    assert recipe["HW"] == "function"
    with pytest.raises(ValueError, match=r"HW must be the function .* for recipe\['HW'\] is 'function'; got None"):
        repeat_replacement(ViT(), recipe)
    assert repeat_replacement(ViT(), recipe, HW=grid).grid == "grid of the model's arguments"
    with pytest.raises(ValueError, match=r"HW must be None, for recipe\['HW'\] is None"):
        repeat_replacement(ViT(), by_json(replace_attention(ViT()).recipe()), HW=grid)


@pytest.mark.parametrize("build", [sana, lambda: sana(qk_norm="rms_norm_across_heads"), sana_video])
def test_from_pretrained_repeat_load(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = build().eval()
    report = replace_attention(model)
    random_convolutions(model)
    model.save_pretrained(tmp_path)
    (tmp_path / "swap.json").write_text(json.dumps(report.recipe()))

    fresh = type(model).from_pretrained(tmp_path)
    repeat_replacement(fresh, json.loads((tmp_path / "swap.json").read_text()))
    fresh.load_state_dict(load_file(tmp_path / "diffusion_pytorch_model.safetensors"), assign=True)

    x = torch.randn(2, 4, 3, 8, 12) if build is sana_video else torch.randn(2, 4, 8, 12)
    with torch.no_grad():
        assert torch.equal(by_name(fresh.eval(), x), by_name(model, x))


def test_a_pipeline_is_saved_and_loaded(tmp_path: Path) -> None:
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=8)
    transformer = diffusers.DiTTransformer2DModel(**SHAPE, out_channels=8, norm_num_groups=1)  # of 1000 classes
    pipe = diffusers.DiTPipeline(transformer.eval(), vae.eval(), diffusers.DDIMScheduler())
    report = replace_attention(pipe.transformer)
    random_convolutions(pipe.transformer)
    pipe.save_pretrained(tmp_path)
    recipe = by_json(report.recipe())

    loaded = diffusers.DiTPipeline.from_pretrained(tmp_path)
    repeat_replacement(loaded.transformer, recipe)
    weights = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    loaded.transformer.load_state_dict(weights, assign=True)

    def images(pipe: Any) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        out = pipe([1], num_inference_steps=2, output_type="np", generator=torch.manual_seed(0))
        return torch.as_tensor(out.images)

    assert torch.equal(images(loaded), images(pipe))


GOOD = {"version": 1, "layers": ["blocks.0.attn"], "HW": None, "options": {"lambda_init": 0.5}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"recipe\['version'\] must be 1, .*; got 2"),
        ({"version": True}, r"recipe\['version'\] must be 1, .*; got True"),
        ({"version": None}, r"recipe\['version'\] must be 1"),
        ({"layers": []}, r"recipe\['layers'\] must be a list of the names of one layer or more; got \[\]"),
        ({"layers": "blocks.0.attn"}, r"recipe\['layers'\] must be a list .*; got 'blocks.0.attn'"),
        ({"layers": [0]}, r"recipe\['layers'\] must be a list .*; got \[0\]"),
        ({"layers": ["blocks.7.attn"]}, r"'blocks.7.attn', which is no attention layer of .* are: blocks.0.attn"),
        ({"layers": ["blocks.*"]}, r"recipe\['layers'\] has 'blocks.\*', which is no attention layer"),
        ({"HW": 4}, r"recipe\['HW'\] is 4: HW must be \(rows, columns\), .*; got 4, or null, or 'function'"),
        ({"HW": [4, 0]}, r"recipe\['HW'\] is \[4, 0\]: HW\[1\] must be at least 1; got 0"),
        ({"HW": [4.0, 4]}, r"recipe\['HW'\] is \[4.0, 4\]: HW\[0\] must be an int"),
        ({"HW": "os.system"}, r"recipe\['HW'\] is 'os.system': HW must be \(rows, columns\)"),
        ({"options": None}, r"recipe\['options'\] must be a mapping .*; got None"),
        ({"options": {"lambda": 1}}, r"recipe\['options'\] has 'lambda', which is none of the options num_heads, "),
        ({"options": {"dim": 32}}, r"recipe\['options'\] has 'dim', which is none of the options"),
        ({"options": {"lambda_init": "small"}}, "lambda_init must be a number; got str 'small'"),
        ({"options": {"lambda_init": float("nan")}}, "lambda_init must be a finite number"),
        ({"options": {"normalization": ["length"]}}, r"normalization must be one of .*; got \['length'\]"),
        ({"options": {"num_heads": 5}}, "num_heads=5"),
        ({"more": 1}, "recipe must have the fields version, layers, HW, options alone; it has 'more' beside them"),
    ],
    ids=str,
)  # fmt: skip
def test_a_malformed_recipe_is_told_field_value_and_what_was_expected(change: dict[str, Any], message: str) -> None:
    model = ViT()
    with pytest.raises((TypeError, ValueError), match=message):
        repeat_replacement(model, GOOD | change)
    assert not new_layers(model) and not model.patch_embed.proj._forward_hooks


def test_recipes_that_lack_fields_or_are_none() -> None:
    for field in GOOD:
        with pytest.raises(ValueError, match=f"it lacks {field}"):
            repeat_replacement(ViT(), {name: value for name, value in GOOD.items() if name != field})
    for other in (None, "{}", [GOOD], 3):
        with pytest.raises(TypeError, match=r"recipe must be a mapping, as report.recipe\(\) returns it"):
            repeat_replacement(ViT(), other)  # type: ignore[arg-type]


def test_a_recipe_of_another_model_is_refused() -> None:
    recipe = replace_attention(MODELS["timm's vision transformers with `qk_norm`"].make()).recipe()
    model = ViT()
    model.blocks[1].attn.attn_drop.p = 0.5
    with pytest.raises(ValueError, match=r"'blocks.1.attn', which cannot be swapped in this model: attn_drop = 0.5"):
        repeat_replacement(model, recipe)
    assert not new_layers(model)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["3x3", "off"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
OPTIONS = ["num_heads", "normalization", "gamma_init", "differential", "dwc_branches", "num_projectors", "qk_norm_eps"]


@given(
    change=st.dictionaries(st.sampled_from(sorted(GOOD)), JSON, max_size=2),
    options=st.dictionaries(st.sampled_from(OPTIONS), JSON, max_size=2),
)
def test_whatever_json_holds_is_a_swap_or_a_clear_error(change: dict[str, Any], options: dict[str, Any]) -> None:
    model = ViT()
    try:
        repeat_replacement(model, GOOD | {"options": options} | change)
    except (TypeError, ValueError) as error:
        assert str(error) and not new_layers(model)
    else:
        output(model, 8, 8)
