"""Models after replace_attention: grids, masks, what their blocks pass, copies, training, saving, compilation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydila_kernels import DyDiLAttention, repeat_replacement, replace_attention
from dydila_kernels.testing import relative_error
from tests.models import (
    Attention,
    D,
    ViT,
    call,
    dit,
    image,
    new_layers,
    output,
    pixart,
    random_convolutions,
    sana,
)


@pytest.mark.parametrize("build", [ViT, pixart, sana])
def test_the_grid_is_that_of_the_image(build: Callable[[], nn.Module]) -> None:
    model = build().eval()
    report = replace_attention(model)
    random_convolutions(model)
    state = model.state_dict()
    wide, tall = output(model, 4, 16), output(model, 16, 4)
    report.undo()

    patch = 1 if build is sana else 2
    for HW in ((4 // patch, 16 // patch), lambda x, *_, **__: (x.shape[2] // patch, x.shape[3] // patch)):
        with_HW = replace_attention(model, HW=HW)
        model.load_state_dict(state)
        assert torch.equal(output(model, 4, 16), wide)
        if not callable(HW):
            assert not torch.equal(output(model, 16, 4), tall)  # tokens as many, on the wrong grid
            with pytest.raises(ValueError, match=f"always {HW[0]} x {HW[1]}, does not hold"):
                output(model, 4, 8)
        else:
            assert torch.equal(output(model, 16, 4), tall)
        with_HW.undo()


def test_prefix_tokens_are_those_of_the_model_or_of_the_caller() -> None:
    model = ViT()
    report = replace_attention(model)
    assert {layer.num_prefix_tokens for layer in new_layers(model)} == {1}
    report.undo()
    replace_attention(model, num_prefix_tokens=0)
    with pytest.raises(
        ValueError, match=r"blocks\.0\.attn has 17 tokens after 0 prefix .* pass to .* num_prefix_tokens"
    ):
        output(model)


def test_recomputation_finds_the_grid_of_its_own_image_or_raises() -> None:
    model = ViT(checkpointing=True)
    replace_attention(model)
    random_convolutions(model)

    plain = copy.deepcopy(model)
    plain.checkpointing = False

    def gradients(model: nn.Module, *sizes: tuple[int, int]) -> list[Tensor]:
        model.zero_grad()
        loss = sum(call(model, image(model, *size)).square().sum() for size in sizes)
        output(model, 4, 16)  # without gradients: never recomputed
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for sizes in ([(4, 16)], [(16, 4)], [(8, 8), (4, 8)]):
        recomputed = gradients(model, *sizes)
        assert all(torch.equal(a, b) for a, b in zip(recomputed, gradients(plain, *sizes), strict=True))
    with pytest.raises(RuntimeError, match=r"the grids \[\(2, 8\), \(8, 2\)\]"):
        gradients(model, (4, 16), (16, 4))


def test_a_mask_may_hide_keys_and_no_more() -> None:
    model, x = ViT().eval(), torch.randn(4, 17, D)
    replace_attention(model)
    attn = model.blocks[0].attn
    keep = torch.rand(4, 17) > 0.3
    expected = DyDiLAttention.forward(attn, x, keep, (4, 4))
    assert torch.equal(attn(x, attn_mask=keep[:, None, None], HW=(4, 4)), expected)
    for hidden in (-10000.0, -torch.inf):
        bias = torch.zeros(4, 1, 1, 17).masked_fill_(~keep[:, None, None], hidden)
        for arguments in ({"attn_mask": bias}, {"attn_bias": bias}):
            assert torch.equal(attn(x, **arguments, HW=(4, 4)), expected)
    for bad, message in (
        ({"attn_mask": keep}, r"attn_mask must hide keys, in the shape \(4, 1, 1, 17\)"),
        ({"attn_mask": torch.ones(17, 17, dtype=torch.bool)}, "attn_mask must hide keys"),
        ({"attn_mask": torch.rand(4, 1, 1, 17)}, "attn_mask must be 0, or to hide a key -1000 or less"),
        ({"attn_mask": "causal"}, "attn_mask must be a tensor"),
        ({"is_causal": True}, "is_causal must be False"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            attn(x, **bad, HW=(4, 4))

    model = pixart().eval()
    replace_attention(model)
    noisy = image(model).index_fill(3, torch.arange(6, 8), torch.nan)  # the last column of patches
    keep = (torch.arange(16) % 4 < 3).expand(4, -1)
    seen = call(model, noisy.nan_to_num(1.0), attention_mask=keep.float())
    assert torch.equal(seen[..., :6], call(model, noisy.nan_to_num(2.0), attention_mask=keep.float())[..., :6])


def test_what_diffusers_may_pass_is_checked() -> None:
    model = pixart()
    replace_attention(model)
    attn, x = model.transformer_blocks[0].attn1, torch.randn(2, 16, D)
    nothing = {"encoder_hidden_states": None, "attention_mask": None, "temb": None}
    assert torch.equal(attn(x, **nothing, HW=(4, 4)), DyDiLAttention.forward(attn, x, HW=(4, 4)))
    with pytest.raises(RuntimeError, match="and no call is under way"):
        attn(x)
    for arguments, message in (
        ({"encoder_hidden_states": x}, "encoder_hidden_states must be None"),
        ({"image_rotary_emb": x}, "image_rotary_emb must be None"),
        ({"attention_mask": torch.zeros(8, 16, 16)}, "attention_mask must hide keys"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            attn(x, **arguments)


@pytest.mark.parametrize("build", [ViT, sana])
def test_copies_pickles_and_dtypes(build: Callable[[], nn.Module]) -> None:
    model = build().eval()
    replace_attention(model)
    random_convolutions(model)
    expected = output(model, 4, 16)
    copied, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    output(model)  # another grid, which is the original's alone
    assert torch.equal(output(copied, 4, 16), expected) and torch.equal(output(unpickled, 4, 16), expected)
    for twin in (copied, unpickled):
        assert new_layers(twin)[0].grid is new_layers(twin)[1].grid is not new_layers(model)[0].grid

    low = build().eval().to(torch.bfloat16)
    replace_attention(low)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert call(low, image(low).bfloat16()).dtype == torch.bfloat16
    for attn in new_layers(copied):
        attn.fuse()
    assert relative_error(output(copied, 4, 16), expected) < 1e-5


@pytest.mark.parametrize(
    "build", [ViT, sana, pytest.param(dit, marks=pytest.mark.slow), pytest.param(pixart, marks=pytest.mark.slow)]
)
def test_a_swapped_model_trains_saves_and_loads(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """A hundred steps."""
    model = build()
    report = replace_attention(model)
    if isinstance(model, ViT):
        target = torch.arange(64) % 10
        x = torch.randn(10, 1, 8, 8)[target] + 0.3 * torch.randn(64, 1, 8, 8)  # ten pictures in noise
    else:
        x = torch.randn(64, 4, 4, 4) if build is sana else torch.randn(64, 4, 8, 8)  # 16 tokens
        target = x.roll(1, 3) * 0.5  # the value of a neighbour
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(100):
        rows = torch.arange(step * 8, step * 8 + 8) % len(x)
        y = call(model, x[rows])
        loss = F.cross_entropy(y, target[rows]) if isinstance(model, ViT) else F.mse_loss(y[:, :4], target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    start, end = sum(losses[:10]), sum(losses[-10:])
    assert end < 0.6 * start, (start, end)

    torch.save({"model": model.state_dict(), "recipe": report.recipe()}, tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    expected = output(model.eval())
    fresh = build()
    repeat_replacement(fresh, saved["recipe"])
    fresh.load_state_dict(saved["model"])
    assert torch.equal(output(fresh.eval()), expected)


def test_what_from_pretrained_makes_of_a_swapped_model(tmp_path: Path) -> None:
    """The old layers, without weights; the swap gives the new ones a place to load theirs into."""
    load_file = pytest.importorskip("safetensors.torch").load_file
    model = sana().eval()
    report = replace_attention(model)
    random_convolutions(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert {name for name, p in loaded.named_parameters() if p.is_meta} == {
        f"{layer.name}.{name}" for layer in report.swapped for name, _ in layer.old.named_parameters()
    }
    repeat_replacement(loaded, report.recipe())
    loaded.load_state_dict(load_file(tmp_path / "diffusion_pytorch_model.safetensors"), assign=True)
    assert torch.equal(output(loaded.eval(), 4, 16), output(model, 4, 16))


def test_a_model_on_the_meta_device_is_swapped_and_loaded() -> None:
    model = ViT().eval()
    replace_attention(model)
    with torch.device("meta"):
        fresh = ViT()
    replace_attention(fresh)
    assert all(p.is_meta for p in fresh.parameters())
    fresh.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(output(fresh.eval()), output(model))


@pytest.mark.slow
def test_a_swapped_model_compiles_whole_and_knows_new_grids() -> None:
    model = ViT(Attention()).eval()
    replace_attention(model)
    random_convolutions(model)
    sizes = [(4, 16), (16, 4)]
    expected = [output(model, *size) for size in sizes]
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for size, out in zip(sizes, expected, strict=True):
        with torch.no_grad():
            assert relative_error(compiled(image(model, *size)), out) < 1e-5
