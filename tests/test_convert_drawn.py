"""Drawn lives of one swapped model: calls on odd grids, in threads, within one another, failing, recomputed, copied."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor, nn

from dydila_kernels import replace_attention
from tests.models import ViT, image, random_convolutions

Size = tuple[int, int]
# Rows and columns of patches: odd, single, and many with as many tokens as others.
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9)) | st.sampled_from([(1, 12), (12, 1), (2, 6), (6, 2), (3, 4)])


def pixels(model: nn.Module, size: Size) -> Tensor:
    return image(model, 2 * size[0], 2 * size[1])


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], materialize_grads=True))


class SwappedModel(RuleBasedStateMachine):
    """The oracle is the same model that was told its one grid, and recomputes nothing."""

    @initialize(checkpointing=st.booleans())
    def swap(self, checkpointing: bool) -> None:
        torch.manual_seed(0)
        self.model = ViT(checkpointing=checkpointing)
        replace_attention(self.model)
        random_convolutions(self.model)
        self.losses: list[tuple[Size, Tensor]] = []

    def told(self, size: Size) -> nn.Module:
        twin = ViT()
        replace_attention(twin, HW=size)
        twin.load_state_dict(self.model.state_dict())
        return twin

    def expected(self, size: Size) -> Tensor:
        with torch.no_grad():
            return self.told(size)(pixels(self.model, size))

    @rule(size=SIZES)
    def call(self, size: Size) -> None:
        with torch.no_grad():
            assert torch.equal(self.model(pixels(self.model, size)), self.expected(size))

    @rule(sizes=st.lists(SIZES, min_size=2, max_size=4))
    def call_in_threads(self, sizes: list[Size]) -> None:
        start, right = Barrier(len(sizes)), [self.expected(size) for size in sizes]

        def repeated(size: Size) -> list[Tensor]:
            start.wait()
            with torch.no_grad():
                return [self.model(pixels(self.model, size)) for _ in range(3)]

        with ThreadPoolExecutor(len(sizes)) as pool:
            for outs, out in zip(pool.map(repeated, sizes), right, strict=True):
                assert all(torch.equal(one, out) for one in outs)

    @rule(outer=SIZES, inner=SIZES, block=st.integers(0, 1), fails=st.booleans())
    def call_within_a_call(self, outer: Size, inner: Size, block: int, fails: bool) -> None:
        found: list[Any] = []

        def nested(*_: object) -> None:
            hook.remove()
            failure = self.model.head.register_forward_pre_hook(lambda *_: 1 / 0) if fails else None
            try:
                found.append(self.model(pixels(self.model, inner)))
            except ZeroDivisionError:
                found.append(None)
            if failure is not None:
                failure.remove()

        hook = self.model.blocks[block].register_forward_pre_hook(nested)
        with torch.no_grad():
            assert torch.equal(self.model(pixels(self.model, outer)), self.expected(outer))
        assert found == [None] if fails else torch.equal(found[0], self.expected(inner))

    @rule(size=SIZES)
    def train(self, size: Size) -> None:
        self.losses.append((size, self.model(pixels(self.model, size)).square().sum()))

    @precondition(lambda self: self.losses)
    @rule(data=st.data(), elsewhere=st.booleans())
    def backward(self, data: st.DataObject, elsewhere: bool) -> None:
        """Of any of the losses, in whatever order, here or in another thread."""
        size, loss = self.losses.pop(data.draw(st.integers(0, len(self.losses) - 1)))
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(gradients, self.model, loss).result() if elsewhere else gradients(self.model, loss)
        twin = self.told(size)
        right = gradients(twin, twin(pixels(twin, size)).square().sum())
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))

    @rule()
    def copy(self) -> None:
        self.model = copy.deepcopy(self.model)
        self.losses = []


TestSwappedModel = SwappedModel.TestCase
TestSwappedModel.settings = settings(max_examples=12, stateful_step_count=12)
