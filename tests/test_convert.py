"""replace_attention: what is swapped and what is kept, where the new layers start, and undo."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydila_kernels import DyDiLAttention, replace_attention
from dydila_kernels.convert import DiffusersAttention, VisionAttention
from dydila_kernels.testing import relative_error
from tests.models import MODELS, Attention, D, H, ViT, diffusers, dit, new_layers, output, random_convolutions, sana


def plain_linear_attention(x: Tensor, qkv: nn.Linear, proj: nn.Linear, num_heads: int) -> Tensor:
    """Eq. 4 with ReLU, with its matrix of scores: nothing shared with the code under test."""
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
    scores = q.relu() @ k.relu().transpose(-2, -1)
    return proj(((scores / scores.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("build", MODELS)
def test_self_attention_is_swapped_and_its_weights_carried_over(build: Callable[[], nn.Module]) -> None:
    model = build().eval()
    model.requires_grad_(False)
    old = copy.deepcopy(model)
    report = replace_attention(model)

    names = ["blocks.0.attn", "blocks.1.attn"] if build is ViT else [f"transformer_blocks.{i}.attn1" for i in (0, 1)]
    assert [layer.name for layer in report.swapped] == names
    crosses = [] if build in (ViT, dit) else ["transformer_blocks.0.attn2", "transformer_blocks.1.attn2"]
    assert [(k.name, k.reason) for k in report.kept] == [(name, "it is cross-attention") for name in crosses]
    for name, layer, new in report.swapped:
        was, now = old.get_submodule(name), model.get_submodule(name)
        assert now is new and type(now) is (VisionAttention if build is ViT else DiffusersAttention)
        qkv = [was.qkv] if build is ViT else [was.to_q, was.to_k, was.to_v]
        proj = was.proj if build is ViT else was.to_out[0]
        assert torch.equal(new.qkv.weight, torch.cat([linear.weight for linear in qkv]))
        assert (new.qkv.bias is None) == (qkv[0].bias is None)
        assert new.qkv.bias is None or torch.equal(new.qkv.bias, torch.cat([linear.bias for linear in qkv]))
        assert torch.equal(new.proj.weight, proj.weight) and torch.equal(new.proj.bias, proj.bias)
        assert (new.num_heads, new.training) == (H, False) and type(layer) is type(was)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    routers = {name for name in report.new_parameters if "router" in name}
    assert frozen == {n for n, _ in model.named_parameters()} - set(report.new_parameters) | routers
    assert output(model).isfinite().all()
    assert all(name in str(report) for name in [*names, *crosses, "lambda_init=0.001", "grid: that of the "])


@pytest.mark.parametrize(("dim", "num_heads"), [(64, 4), (384, 6), (256, 1)])
def test_a_swapped_layer_starts_near_plain_linear_attention(dim: int, num_heads: int) -> None:
    """Exactly so for lambda = 0; the bounds are the figures of the guide."""
    model = nn.Sequential(Attention(dim, num_heads)).double().eval()
    nn.init.xavier_uniform_(model[0].qkv.weight)
    x = F.layer_norm(torch.randn(2, 256, dim, dtype=torch.float64), (dim,))
    with torch.no_grad():
        plain = plain_linear_attention(x, model[0].qkv, model[0].proj, num_heads)
        for lambda_init, bound in ((0.0, 1e-12), (0.001, 0.005), (0.01, 0.05)):
            report = replace_attention(model, lambda_init=lambda_init, HW=(16, 16))
            error = relative_error(model(x), plain)
            assert error < bound, (lambda_init, error)
            assert error > bound / 10 or not lambda_init
            report.undo()


def test_a_swapped_sana_computes_nearly_what_it_did() -> None:
    model = sana().eval()
    before = output(model)
    report = replace_attention(model, lambda_init=0.0)
    assert relative_error(output(model), before) < 1e-5  # float32
    report.undo()
    replace_attention(model)
    assert relative_error(output(model), before) < 0.02


@pytest.mark.parametrize(
    ("selection", "swapped"),
    [
        ({"include": "blocks.1.attn"}, [1]),
        ({"include": ["blocks.0", 2]}, [0, 2]),
        ({"include": "blocks.[12]*", "exclude": -1}, [1]),
        ({"exclude": ["blocks.0", "*.1.attn"]}, [2]),
        ({"include": -1}, [2]),
    ],
    ids=str,
)
def test_blocks_are_chosen_by_name_glob_or_index(selection: dict[str, Any], swapped: list[int]) -> None:
    model = ViT(Attention(), Attention(), Attention())
    report = replace_attention(model, **selection)
    assert [layer.name for layer in report.swapped] == [f"blocks.{i}.attn" for i in swapped]
    assert [k.name for k in report.kept] == [f"blocks.{i}.attn" for i in range(3) if i not in swapped]
    assert {k.reason for k in report.kept} <= {"the caller did not include it", "the caller excluded it"}
    assert [isinstance(block.attn, DyDiLAttention) for block in model.blocks] == [i in swapped for i in range(3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"include": "layers.0"}, "include has 'layers.0', which matches no attention layer; there are: blocks.0.attn"),
        ({"exclude": [5]}, "exclude has the index 5, but 2 layers can be swapped"),
        ({"include": [True]}, "include must hold names, globs and indices"),
        ({"exclude": "*"}, "no self-attention that can be swapped\n  blocks.0.attn  Attention  the caller excluded it"),
        ({"num_heads": 5}, "num_heads=5"),
        ({"lambda_init": "small"}, "lambda_init"),
        ({"num_projectors": 0}, "num_projectors"),
        ({"number_of_projectors": 3}, "number_of_projectors"),
        ({"qkv_bias": True}, "qkv_bias must be left to the old layer"),
        ({"HW": 8}, r"HW must be \(rows, columns\), or .*, or a function that returns it; got 8"),
        ({"HW": (4, 0)}, r"HW\[1\] must be at least 1"),
        ({"HW": (4, 4), "dwc_branches": ()}, "HW must be None with dwc_branches"),
    ],
    ids=str,
)
def test_an_error_leaves_the_model_untouched(arguments: dict[str, Any], message: str) -> None:
    model = ViT()
    modules = list(model.modules())
    with pytest.raises((TypeError, ValueError), match=message):
        replace_attention(model, **arguments)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert not model.patch_embed.proj._forward_hooks


def changed(change: Callable[[Any], None], layer: nn.Module | None = None) -> nn.Module:
    layer = layer or Attention()
    change(layer)
    return layer


class Rope(Attention):
    def forward(self, x: Tensor, rope: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Lora(nn.Linear):
    pass


def diffusers_attention(**options: Any) -> nn.Module:
    return diffusers.models.attention_processor.Attention(D, heads=H, dim_head=D // H, **options)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Attention(attn_drop=0.1), "attn_drop = 0.1"),
        (lambda: changed(lambda a: setattr(a, "q_norm", nn.LayerNorm(8))), r"q_norm \(LayerNorm\) would be lost"),
        (lambda: changed(lambda a: setattr(a, "norm", nn.LayerNorm(8))), r"norm \(LayerNorm\) would be lost"),
        (lambda: changed(lambda a: setattr(a, "rel_pos", nn.Parameter(torch.ones(3)))), "rel_pos would be lost"),
        (lambda: changed(lambda a: setattr(a, "window_size", (4, 4))), "window_size"),
        (lambda: changed(lambda a: setattr(a, "qkv", Lora(D, 3 * D))), "a projection is a Lora"),
        (lambda: changed(lambda a: setattr(a, "qkv", nn.Linear(D, 6 * D))), r"has the shape \(192, 32\)"),
        (lambda: changed(lambda a: setattr(a, "forward", a.forward)), "its forward was replaced"),
        (lambda: changed(lambda a: setattr(a, "_compiled_call_impl", print)), "its forward was replaced or compiled"),
        (lambda: changed(lambda a: a.qkv.register_forward_hook(print)), "its hooks would be lost"),
        (lambda: changed(lambda a: a.proj.bfloat16()), "not of one floating dtype"),
        (Rope, "its forward takes rope"),
        (lambda: nn.MultiheadAttention(D, H), "neither qkv and proj nor to_q"),
        (lambda: DyDiLAttention(D), "a DyDiLAttention already"),
        (lambda: diffusers_attention(qk_norm="l2"), r"norm_q \(LpNorm\) would be lost"),
        (lambda: diffusers_attention(norm_num_groups=1), r"group_norm \(GroupNorm\) would be lost"),
        (lambda: diffusers_attention(rescale_output_factor=2.0), "rescale_output_factor = 2.0"),
        (lambda: diffusers_attention(residual_connection=True), "residual_connection = True"),
        (lambda: diffusers_attention(added_kv_proj_dim=8), "add_k_proj"),
        (lambda: diffusers_attention(kv_heads=1), r"has the shape \(8, 32\), not \(32, 32\)"),
        (lambda: diffusers_attention(processor=diffusers.models.attention_processor.HunyuanAttnProcessor2_0()),
         "processor HunyuanAttnProcessor2_0"),
        (lambda: changed(lambda a: a.fuse_projections(), diffusers_attention()), "to_qkv"),
        (lambda: changed(lambda a: a.to_k.requires_grad_(False), diffusers_attention()), "differ in bias or requires_"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_kept_with_the_reason(make: Callable[[], nn.Module], reason: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' deprecations
        odd = make()
    model = ViT(odd, Attention())
    report = replace_attention(model)
    assert model.blocks[0].attn is odd
    assert [layer.name for layer in report.swapped] == ["blocks.1.attn"]
    (kept,) = report.kept
    assert kept.name == "blocks.0.attn"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(kept.reason)


def test_layers_that_share_weights_are_kept() -> None:
    first, second = Attention(), Attention()
    second.qkv.weight = first.qkv.weight
    model = ViT(first, second, Attention())
    assert {k.reason for k in replace_attention(model).kept} == {"it shares weights with another layer"}


def test_a_layer_in_two_blocks_stays_one_layer() -> None:
    shared = Attention()
    model = ViT(shared, shared)
    report = replace_attention(model, include=0)
    assert model.blocks[0].attn is model.blocks[1].attn is report.swapped[1].new
    report.undo()
    assert model.blocks[0].attn is model.blocks[1].attn is shared


def test_wrapped_models_are_refused() -> None:
    for wrapped in (nn.DataParallel(ViT()), nn.Sequential(torch.compile(ViT()))):
        with pytest.raises(ValueError, match="must be neither wrapped nor compiled"):
            replace_attention(wrapped)
    with pytest.raises(ValueError, match="the model itself"):
        replace_attention(Attention())
    with pytest.raises(TypeError, match="model must be an"):
        replace_attention([ViT()])  # type: ignore[arg-type]


@pytest.mark.parametrize("build", MODELS)
def test_undo_restores_the_function_to_the_bit(build: Callable[[], nn.Module]) -> None:
    model = build()
    before, keys = output(model.eval()), list(model.state_dict())
    report = replace_attention(model.train())
    random_convolutions(model)
    with torch.no_grad():
        for parameter in (p for layer in new_layers(model) for p in layer.parameters()):
            parameter.add_(0.1)
    model.eval()
    assert relative_error(output(model), before) > 1e-3
    report.undo()
    report.undo()
    assert list(model.state_dict()) == keys and torch.equal(output(model), before)
    assert not any(m.training or m._forward_hooks for m in model.modules())
    assert len(replace_attention(model).swapped) == 2


def test_undo_follows_the_model_and_refuses_to_lose_anything() -> None:
    model = ViT()
    report = replace_attention(model)
    model.double()
    report.undo()
    assert {p.dtype for p in model.parameters()} == {torch.float64}

    report = replace_attention(model)
    model.blocks[1].attn = nn.Identity()
    with pytest.raises(RuntimeError, match=r"blocks\.1\.attn is no longer the layer"):
        report.undo()
    assert isinstance(model.blocks[0].attn, DyDiLAttention)

    with torch.device("meta"):
        model = ViT()
    report = replace_attention(model)
    model.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn was on the meta device"):
        report.undo()
