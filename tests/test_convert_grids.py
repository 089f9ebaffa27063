"""The grid of a swapped model belongs to the call: threads, nested calls, failures, recomputation, compilation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from dydila_kernels import replace_attention
from dydila_kernels.testing import relative_error
from tests.models import Attention, Block, D, ViT, call, image, output, random_convolutions, sana, unet

SIZES = [(4, 16), (16, 4), (8, 8), (2, 32)]  # as many tokens in all
ODD = [
    (4, 14),
    (6, 10),
    (18, 4),
    (4, 6),
    (10, 6),
    (14, 6),
]  # 2 x 7, 3 x 5, ... and none of one row, which torch.compile takes apart


def swapped(build: Callable[[], nn.Module] = ViT, **options: Any) -> nn.Module:
    model = build().eval()
    replace_attention(model, **options)
    random_convolutions(model)
    return model


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def assert_threads_do_not_mix(model: nn.Module) -> None:
    """Each thread calls the model on images of its own size, all at once."""
    start, expected = Barrier(len(SIZES)), [output(model, *size) for size in SIZES]

    def repeated(size: tuple[int, int]) -> list[Tensor]:
        start.wait()
        return [output(model, *size) for _ in range(10)]

    with ThreadPoolExecutor(len(SIZES)) as pool:
        for outs, right in zip(pool.map(repeated, SIZES), expected, strict=True):
            assert all(torch.equal(out, right) for out in outs)


@pytest.mark.parametrize("build", [ViT, sana, unet])
def test_threads_on_one_model_do_not_mix_their_grids(build: Callable[[], nn.Module]) -> None:
    assert_threads_do_not_mix(swapped(build))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_threads_train_one_model_at_once(checkpointing: bool) -> None:
    model, start = swapped(lambda: ViT(checkpointing=checkpointing)), Barrier(len(SIZES))

    def train(size: tuple[int, int]) -> list[Tensor]:
        return gradients(model, call(model, image(model, *size)).square().sum())

    def repeated(size: tuple[int, int]) -> list[list[Tensor]]:
        start.wait()
        return [train(size) for _ in range(4)]

    expected = [train(size) for size in SIZES]
    with ThreadPoolExecutor(len(SIZES)) as pool:
        for found, right in zip(pool.map(repeated, SIZES), expected, strict=True):
            assert all(torch.equal(a, b) for one in found for a, b in zip(one, right, strict=True))


@pytest.mark.parametrize("build", [ViT, unet])
@pytest.mark.parametrize("fails", [False, True])
def test_a_model_may_be_called_within_its_own_call(build: Callable[[], nn.Module], fails: bool) -> None:
    """From a hook between the blocks, on an image of another shape; the inner call may even fail."""
    model = swapped(build)
    outer, inner = (output(model, *size) for size in SIZES[:2])
    between, late = (model.blocks[1], model.head) if build is ViT else (model.mid_block.resnets[0], model.conv_out)
    failure = None if not fails else late.register_forward_pre_hook(lambda *_: 1 / 0)
    found: list[Any] = []

    def nested(*_: object) -> None:
        hook.remove()
        try:
            found.append(output(model, *SIZES[1]))
        except ZeroDivisionError as error:
            found.append(error)
            assert failure is not None
            failure.remove()

    hook = between.register_forward_pre_hook(nested)
    assert torch.equal(output(model, *SIZES[0]), outer)
    assert isinstance(found[0], ZeroDivisionError) if fails else torch.equal(found[0], inner)


def test_a_failed_call_leaves_nothing_behind() -> None:
    model = swapped()
    expected = output(model, 4, 16)
    handle = model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            output(model, 16, 4)
    handle.remove()
    with pytest.raises(RuntimeError, match="no call is under way"):
        model.blocks[0](torch.randn(1, 17, D))
    assert torch.equal(output(model, 4, 16), expected)


def test_parts_of_a_model_may_be_called() -> None:
    """As forward_features of timm does, and whoever calls one block."""
    model = swapped()

    def features(x: Tensor) -> Tensor:
        x = model.patch_embed(x)
        x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1)
        for block in model.blocks:
            x = block(x)
        return model.head(x.mean(1))

    with torch.no_grad():
        for size in SIZES:
            assert torch.equal(features(image(model, *size)), output(model, *size))
    attn, x = model.blocks[0].attn, torch.randn(1, 17, D)
    assert torch.equal(attn(x, HW=(2, 8)), type(attn).__mro__[2].forward(attn, x, None, (2, 8)))


def test_a_model_in_a_model_has_grids_of_its_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = ViT(), ViT()

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x.mT)

    model = Two().eval()
    report = replace_attention(model)
    assert (
        report.grid == "that of the patches of first.patch_embed.proj; that of the patches of second.patch_embed.proj"
    )
    random_convolutions(model)
    x = image(model.first, 4, 16)
    with torch.no_grad():
        assert torch.equal(model(x), model.first(x) + model.second(x.mT))


class Checkpointed(ViT):
    """Its blocks are recomputed in the way that is asked for."""

    how: Any = None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        if self.how == "all at once":
            x = checkpoint(lambda x: self.blocks[1](self.blocks[0](x)), x, use_reentrant=False)
        elif self.how == "attention":
            for block in self.blocks:
                x = x + checkpoint(block.attn, block.norm1(x), use_reentrant=False)
                x = x + block.mlp(block.norm2(x))
        elif self.how is None:
            for block in self.blocks:
                x = block(x)
        else:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=self.how == "reentrant")
        return self.head(x.mean(1))


def in_another_thread(work: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "all at once", "attention"])
@pytest.mark.parametrize("run", [lambda work: work(), in_another_thread], ids=["here", "another thread"])
def test_a_recomputed_block_has_the_grid_of_its_own_call(how: str, run: Callable[..., Any]) -> None:
    model = swapped(Checkpointed)

    def losses() -> list[Tensor]:
        return [call(model, image(model, *size)).square().sum() for size in SIZES]

    expected = [gradients(model, loss) for loss in losses()]
    model.how = how
    if how == "reentrant":  # which has no torch.autograd.grad

        def backward(loss: Tensor) -> list[Tensor]:
            model.zero_grad()
            loss.backward()
            return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    else:
        backward = partial(gradients, model)
    for loss, right in zip(losses(), expected, strict=True):  # all calls are made before the first backward pass
        output(model, 32, 2)
        found = run(lambda loss=loss: backward(loss))
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    assert not model.blocks[0].attn.grid.backward  # nothing is remembered of a backward pass that is over
    one, other = losses()[:2]
    with pytest.raises(
        RuntimeError, match=r"must know its one grid; it is about calls with the grids \[\(2, 8\), \(8,"
    ):
        backward(one + other)


def test_whole_models_and_losses_inside_may_be_recomputed() -> None:
    model = swapped()

    def loss(size: tuple[int, int], recomputed: bool) -> Tensor:
        x = image(model, *size)
        return (checkpoint(model, x, use_reentrant=False) if recomputed else model(x)).square().sum()

    plain = sum(loss(size, False) for size in SIZES)
    recomputed = sum(loss(size, True) for size in SIZES)
    for a, b in zip(gradients(model, recomputed), gradients(model, plain), strict=True):
        torch.testing.assert_close(a, b)


def test_a_unet_under_gradient_checkpointing() -> None:
    model = swapped(unet)
    model.train()

    def both(size: tuple[int, int]) -> list[Tensor]:
        return gradients(model, call(model, image(model, *size)).square().sum())

    expected = [both(size) for size in SIZES[:2]]
    model.enable_gradient_checkpointing()
    for size, right in zip(SIZES[:2], expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(both(size), right, strict=True))


def test_copies_are_about_calls_of_their_own() -> None:
    model = swapped(unet)
    expected = output(model, 4, 16)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with ThreadPoolExecutor(2) as pool:
            theirs = pool.submit(output, twin, 4, 16)
            output(model, 16, 4)
            assert torch.equal(theirs.result(), expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "each block"])
@pytest.mark.parametrize("grad", [True, False])
def test_two_compilations_serve_all_grids(whole: bool, grad: bool) -> None:
    model = swapped(lambda: ViT(Attention()))
    expected = [output(model, *size) for size in ODD]
    counter = CompileCounter()
    if whole:
        compiled = torch.compile(model, backend=counter, fullgraph=True)
    else:
        model.blocks[0].compile(backend=counter, fullgraph=True)
        compiled = model
    with torch.set_grad_enabled(grad):
        for size, right in zip(ODD, expected, strict=True):
            torch.testing.assert_close(compiled(image(model, *size)), right)
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
def test_compiled_blocks_may_be_recomputed() -> None:
    model = swapped(Checkpointed)
    expected = [gradients(model, call(model, image(model, *size)).square().sum()) for size in ODD]
    for block in model.blocks:
        # One graph for all sizes: torch may recompute by another graph than it ran (pytorch/pytorch#166926).
        block.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    model.how = "not reentrant"
    losses = [call(model, image(model, *size)).square().sum() for size in ODD]
    for loss, right in zip(losses, expected, strict=True):
        for a, b in zip(gradients(model, loss), right, strict=True):
            assert relative_error(a, b) < 1e-5 or not b.any()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
def test_a_graph_break_does_not_lose_the_grid() -> None:
    model = swapped()
    expected = [output(model, *size) for size in ODD[:3]]
    model.blocks[1].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    compiled = torch.compile(model, backend="eager")
    for size, right in zip(ODD[:3], expected, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(compiled(image(model, *size)), right)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
def test_threads_on_compiled_blocks_do_not_mix_their_grids() -> None:
    model = swapped()
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True, dynamic=True)
    assert_threads_do_not_mix(model)


def test_function_transforms_of_a_swapped_model() -> None:
    model = swapped()
    parameters = dict(model.named_parameters())
    x = image(model, 4, 16)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)(parameters, x)
    expected = gradients(model, loss(parameters, x))
    for (name, p), right in zip([(n, p) for n, p in parameters.items() if p.requires_grad], expected, strict=True):
        assert p is not None
        torch.testing.assert_close(found[name], right)


def test_a_block_of_its_own_kind_takes_a_grid() -> None:
    """Where nothing shows the grid, the caller says it, and before anything is swapped."""
    model = nn.Sequential(Block(Attention()))
    modules = list(model.modules())
    with pytest.raises(ValueError, match=r"HW=.* is needed, or dwc_branches=\(\).* grid of the image to 0\.attn"):
        replace_attention(model)
    assert modules == list(model.modules())
    report = replace_attention(model, HW=(2, 8))
    assert report.grid == "always 2 x 8"
    model(torch.randn(1, 16, D))
    report.undo()
    assert "none" in replace_attention(model, dwc_branches=()).grid
    model(torch.randn(1, 15, D))
