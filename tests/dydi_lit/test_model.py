"""The frame and its models: names, shapes, initial weights, and what the paper says of each row."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("examples.dydi_lit")

from torch import Tensor, nn

from dydila_kernels import DyDiLAttention
from examples.dydi_lit.configs import LADDER, TITLES, Model, ModelConfig, config_of, from_json, to_json
from examples.dydi_lit.layers import ReLULinearAttention, SoftmaxAttention
from examples.dydi_lit.model import DiffusionTransformer, position_embedding

MODELS = tuple(TITLES)
RIVALS: tuple[Model, ...] = ("pixart-sigma", "edit", "dig", "lit", "moh-dit")


def small(model: Model = "dydi-lit", **changes: object) -> ModelConfig:
    return config_of(model, "toy", **{"dim": 32, "depth": 2, "in_channels": 2, "num_classes": 10, **changes})


def awake(config: ModelConfig) -> DiffusionTransformer:
    """A model none of whose layers is at zero."""
    model = DiffusionTransformer(config)
    for name, weight in model.named_parameters():
        if "modulation" in name or "output" in name:
            nn.init.normal_(weight, std=0.05)
    return model


def call(model: nn.Module, image: Tensor) -> Tensor:
    return model(image, torch.tensor([3, 900])[: len(image)], torch.tensor([0, 10])[: len(image)])


# --- names


def test_table_4_adds_one_component_a_row() -> None:
    configs = [config_of(model) for model in LADDER]
    assert configs[0].attention == "relu" and all(config.attention == "dydila" for config in configs[1:])
    focused, measure, projection, differential, whole = configs[1:]
    assert focused.num_kernel_factors == 1 and not focused.learned_gamma
    assert replace(focused, num_kernel_factors=9, learned_gamma=True) == measure
    assert replace(measure, num_projectors=3) == projection
    assert replace(projection, differential="token", normalization="length") == differential
    assert replace(differential, dwc_branches=("3x3", "1x3", "3x1")) == whole == config_of()


def test_sizes_are_the_papers() -> None:
    found = {size: config_of("dydi-lit", size) for size in ("S", "B", "L")}
    assert [config.dim for config in found.values()] == [384, 512, 768]
    assert [config.depth for config in found.values()] == [9, 9, 9]
    assert [config.num_projectors for config in found.values()] == [3, 5, 7]
    assert [config.num_kernel_factors for config in found.values()] == [9, 15, 21]
    assert [config.num_differential_factors for config in found.values()] == [9, 15, 21]
    assert [config_of("dit", size).depth for size in ("S", "B", "L")] == [12, 12, 12]
    assert [config_of("dit", size).num_heads for size in ("S", "B", "L")] == [6, 8, 12]


def test_lambda_increases_where_asked() -> None:
    with torch.device("meta"):
        model = DiffusionTransformer(config_of("increasing-lambda", "S"))
    assert len(model.blocks) == 9
    config = config_of("increasing-lambda", "S")
    assert [round(config.lambda_of(block), 3) for block in (0, 4, 8)] == [0.2, 0.5, 0.8]
    tables = [block.attention.differential.lam for block in awake(small("increasing-lambda")).blocks]
    assert [round(table.mean().item(), 4) for table in tables] == [0.2, 0.8]
    assert config_of().lambda_of(5) == 0.01


@pytest.mark.parametrize("model", MODELS)
def test_configuration_survives_json(model: Model) -> None:
    config = config_of(model, "B", in_channels=1)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


def test_errors_name_what_was_expected() -> None:
    with pytest.raises(ValueError, match="unknown size 'XXL': choose one of toy, tiny, S, B, L"):
        config_of("dydi-lit", "XXL")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown model 'mamba': choose one of dit, sana, "):
        config_of("mamba", "S")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dim must be a multiple of 4.*; got 30"):
        small(dim=30)
    with pytest.raises(ValueError, match="depth must be at least 1; got 0"):
        small(depth=0)
    with pytest.raises(ValueError, match=r"lambda_init must be two numbers.*\(0.1,\)"):
        small(lambda_init=(0.1,))
    with pytest.raises(ValueError, match=r"not the configuration of a model: .*'width'"):
        from_json({"dim": 32, "depth": 1, "width": 3})
    with pytest.raises(ValueError, match="7x8 pixels does not divide into patches of 2x2"):
        call(DiffusionTransformer(small(patch_size=2)), torch.zeros(1, 2, 7, 8))
    for layer in (SoftmaxAttention, ReLULinearAttention):
        with pytest.raises(ValueError, match="num_heads must divide dim; got 3 and 32"):
            layer(32, 3)


# --- the frame


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("patch, size", [(1, (8, 8)), (2, (6, 10))])
def test_every_model_follows_the_image_and_trains_all_of_its_weights(
    model: Model, patch: int, size: tuple[int, int]
) -> None:
    network, image = DiffusionTransformer(small(model, patch_size=patch)), torch.randn(2, 2, *size)
    assert not call(network, image).any()  # the last layer starts at zero
    out = call(awake(network.config), image)
    assert out.shape == (2, 4, *size) and out.dtype == image.dtype
    (out * torch.randn_like(out)).sum().backward()
    network = awake(small(model, learn_sigma=False))
    out = call(network, image)
    assert out.shape == image.shape
    (out * torch.randn_like(out)).sum().backward()
    assert [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("model", ["dydi-lit", "map-differential", "dynamic-projection", "sana", "dit", *RIVALS])
def test_inference_form_and_recomputation_change_nothing(model: Model) -> None:
    network, image = awake(small(model)), torch.randn(2, 2, 8, 8)
    plain = call(network, image)
    plain.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    network.gradient_checkpointing = True
    call(network, image).square().sum().backward()
    assert all(torch.equal(network.get_parameter(name).grad, gradient) for name, gradient in gradients.items())  # type: ignore[arg-type]
    torch.testing.assert_close(call(network.fuse(), image), plain.detach(), rtol=1e-4, atol=1e-5)
    assert all(layer.fused for layer in network.modules() if isinstance(layer, DyDiLAttention))


def test_patches_keep_their_place() -> None:
    """A fresh model is linear from patch to patch; with the identity in both linear layers it returns its input."""
    model = DiffusionTransformer(small(patch_size=2, learn_sigma=False))
    nn.init.eye_(model.patch_embedding.weight)
    nn.init.eye_(model.output.weight)
    model.norm = nn.Identity()  # type: ignore[assignment]
    image = torch.randn(1, 2, 4, 6)
    torch.testing.assert_close(call(model, image) - call(model, torch.zeros_like(image)), image)


def test_position_embedding_tells_rows_from_columns() -> None:
    table = position_embedding((3, 5), 16, torch.device("cpu")).unflatten(0, (3, 5))
    assert len(table.flatten(0, 1).unique(dim=0)) == 15
    assert torch.equal(table[:, 2, :8], table[:1, 2, :8].expand(3, 8))  # one column, one first half, as in DiT
    assert torch.equal(table[1, :, 8:], table[1, :1, 8:].expand(5, 8))


@pytest.mark.parametrize("model", ["dydi-lit", "sana", "dit", *RIVALS])
def test_half_precision(model: Model) -> None:
    """Under autocast the blocks add to float32; a model of bfloat16 weights stays in bfloat16."""
    network, image, seen = awake(small(model)), torch.randn(2, 2, 8, 8), []
    network.blocks[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    exact = call(network, image)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = call(network, image)
    half = call(network.bfloat16(), image.bfloat16())
    assert seen == [torch.float32, torch.float32, torch.bfloat16]
    assert (mixed.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    for found in (mixed, half):
        assert (found - exact).norm() < 0.05 * exact.norm()


def test_condition_matters() -> None:
    model, image = awake(small()), torch.randn(1, 2, 8, 8).expand(3, -1, -1, -1)
    same_time = model(image, torch.tensor([5, 5, 5]), torch.tensor([1, 2, model.null_class]))
    same_label = model(image, torch.tensor([5, 6, 900]), torch.tensor([1, 1, 1]))
    for out in (same_time, same_label):
        assert min((out[i] - out[j]).abs().max() for i, j in [(0, 1), (0, 2), (1, 2)]) > 1e-4


@pytest.mark.parametrize("initialization", ["dit", "pytorch"])
def test_models_of_one_seed_start_equal_where_they_are_alike(initialization: str) -> None:
    states = []
    for model in ("sana", "token-differential", "dydi-lit"):
        torch.manual_seed(7)
        states.append(DiffusionTransformer(small(model, initialization=initialization)).state_dict())  # type: ignore[arg-type]
    for one, other in [(states[0], states[1]), (states[1], states[2])]:
        common = one.keys() & other.keys()
        assert {"blocks.1.attention.qkv.weight", "blocks.0.ffn.depthwise.weight", "label_embedding.weight"} <= common
        assert all(torch.equal(one[name], other[name]) for name in common)
    torch.manual_seed(8)
    assert not torch.equal(DiffusionTransformer(small()).label_embedding.weight, states[2]["label_embedding.weight"])
    first = DiffusionTransformer(small())
    assert not torch.equal(DiffusionTransformer(small()).label_embedding.weight, first.label_embedding.weight)


def test_initial_weights_are_dits() -> None:
    assert config_of("dydi-lit", "S").initialization == "dit"
    model = DiffusionTransformer(small(dim=256, initialization="dit"))
    weight = model.blocks[0].ffn.expand.weight
    bound = (6 / sum(weight.shape)) ** 0.5
    assert 0.99 * bound < weight.abs().max() <= bound
    assert model.label_embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.time_embedding.linear_1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not any(block.modulation.weight.any() or block.modulation.bias.any() for block in model.blocks)


# --- the attention layers of the others


def attention_weights_of_relu(q: Tensor, k: Tensor) -> Tensor:
    scores = q.relu() @ k.relu().mT
    return (scores / scores.sum(-1, keepdim=True)).nan_to_num(0)  # a query that matches nothing gets nothing


@pytest.mark.parametrize("heads, grid", [(1, (3, 4)), (4, (3, 4)), (4, (1, 2)), (1, (9, 9))])
def test_linear_and_softmax_attention_are_their_equations(heads: int, grid: tuple[int, int]) -> None:
    tokens, width = grid[0] * grid[1], 32 // heads
    x = torch.randn(2, tokens, 32, dtype=torch.float64)
    for layer, weights_of in [
        (ReLULinearAttention(32, heads), attention_weights_of_relu),
        (SoftmaxAttention(32, heads), lambda q, k: torch.softmax(q @ k.mT / width**0.5, dim=-1)),
    ]:
        q, k, v = layer.double().qkv(x).chunk(3, dim=-1)
        parts = [
            weights_of(q[..., part], k[..., part]) @ v[..., part]
            for part in (slice(head * width, (head + 1) * width) for head in range(heads))
        ]
        tolerance = {"rtol": 1e-4, "atol": 1e-6} if isinstance(layer, ReLULinearAttention) else {}  # it sums in float32
        torch.testing.assert_close(layer(x, HW=grid), layer.proj(torch.cat(parts, -1)), **tolerance)


def test_linear_attention_without_any_positive_entry_is_zero() -> None:
    layer = ReLULinearAttention(32, 2)
    nn.init.zeros_(layer.qkv.weight)
    x = torch.randn(1, 4, 32, requires_grad=True)
    out = layer(x, HW=(2, 2))
    assert torch.equal(out, layer.proj.bias.expand(1, 4, 32))
    out.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


# --- huggingface form


@pytest.mark.parametrize("model", ["dydi-lit", "increasing-lambda", "dit", *RIVALS])
def test_saved_and_loaded_model_is_the_same(model: Model, tmp_path: Path) -> None:
    network, image = awake(small(model)).eval(), torch.randn(2, 2, 8, 8)
    network.save_pretrained(tmp_path)
    loaded = DiffusionTransformer.from_pretrained(tmp_path)
    assert loaded.config == network.config and not loaded.training
    assert torch.equal(call(loaded, image), call(network, image))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
