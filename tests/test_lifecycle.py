"""Hypothesis leads a layer through its life, in any order: it computes the same function throughout.

The machine keeps the weights beside the layer, in float64; the truth is what the reference makes of them.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor, nn

from dydila_kernels import DyDiLAttention
from dydila_kernels.testing import (
    assert_agree,
    cast,
    equations,
    output_and_gradients,
    relative_error,
    with_distinct_factors,
)
from tests import interpreter
from tests.layers import SUB_MODULES, CallsAnother

CONFIGURATIONS: list[dict[str, Any]] = [
    {"num_heads": 2},
    {"normalization": "denominator", "router_gradient": "straight_through", "dwc_branches": ("3x3", "1x1", "identity")},
    {"differential": "map", "num_heads": 2, "qkv_bias": True, "num_prefix_tokens": 2},
    {"differential": "off", "num_projectors": 0, "dwc_branches": (), "proj_bias": False},
]
FORMATS = ["memory", "torch"] + ["safetensors"] * (importlib.util.find_spec("safetensors") is not None)
MODES = {"grad": nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
REPLACED = ["qkv", "proj", "projection_q", "projection_k"]
"""What is linear in its weights, so that twice the output is that of twice the weights."""
CONTEXTS: dict[str, Callable[[], Any]] = {
    "none": nullcontext,
    "default device": lambda: torch.device("meta"),
    "dispatch mode": lambda: calls_another_layer(),
}

seeds = st.integers(0, 2**16)
contexts = st.sampled_from(sorted(CONTEXTS))
modes = st.sampled_from(sorted(MODES))
dtypes = st.sampled_from([torch.float32, torch.float64])


def calls_another_layer() -> CallsAnother:
    other, x = DyDiLAttention(8, device="cpu"), torch.ones(2, 9, 8, device="cpu")

    def call() -> None:
        with torch.no_grad():
            other(x)

    return CallsAnother(call, every=5)


def through_file(state: dict[str, Tensor], file_format: str) -> dict[str, Tensor]:
    if file_format == "memory":
        return state
    if file_format == "safetensors":
        from safetensors.torch import load, save

        return load(save(state))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def few_bits(t: Tensor) -> Tensor:
    """As bfloat16 holds it, so that no later change of dtype loses anything."""
    return t.to(torch.bfloat16).to(t.dtype)


class Life(RuleBasedStateMachine):
    """``weights`` are those of the unfused layer under its names, in float64; ``model`` is its configuration."""

    attn: DyDiLAttention

    @initialize(configuration=st.sampled_from(CONFIGURATIONS), seed=seeds)
    def begin(self, configuration: dict[str, Any], seed: int) -> None:
        torch.manual_seed(seed)
        self.configuration, self.hooks, self.replaced, self.exact = configuration, {}, set(), True
        self.attn, self.model = self.fresh(dtype=torch.float64), self.fresh(device="meta")
        with torch.no_grad():
            for parameter in with_distinct_factors(self.attn).parameters():
                parameter.copy_(few_bits(parameter))
        self.remember()

    def fresh(self, **factory: Any) -> DyDiLAttention:
        return DyDiLAttention(8, **self.configuration, **factory)

    def remember(self) -> None:
        self.weights = {name: p.detach().double().clone() for name, p in self.attn.named_parameters()}

    @property
    def dtype(self) -> torch.dtype:
        return self.attn.proj.weight.dtype

    @property
    def tolerance(self) -> float:
        return 1e-11 if self.exact and self.dtype == torch.float64 else 2e-4

    def become(self, attn: DyDiLAttention) -> None:
        self.attn, self.hooks, self.replaced = attn, {}, set()
        # What fuse() sums in float32 stays as it was rounded.
        self.exact = self.exact and (not attn.fused or self.dtype == torch.float64)

    def truth(self, t: Mapping[str, Tensor], **arguments: Any) -> Tensor:
        """The equations, with twice the weights where a replaced forward gives twice the output."""
        doubled = {name: 2 * w if name.split(".")[0] in self.replaced and "router" not in name else w
                   for name, w in t.items()}  # fmt: skip
        return equations(self.model, doubled, **arguments)

    # --- calls

    def check(self, mode: str = "grad", call: nn.Module | None = None, context: str = "none", **arguments: Any) -> None:
        """The output, and with gradients those of the input and of the weights that require them."""
        seed, batch = int(torch.randint(2**31, ())), 1 if "cu_seqlens" in arguments else 2
        length = self.attn.num_prefix_tokens + 9 if batch == 2 else arguments["cu_seqlens"][-1]
        x = torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(seed)).to(self.dtype)
        wanted = ["x", *(n for n, p in self.attn.named_parameters() if p.requires_grad)]
        with torch.no_grad():
            indices = self.attn.routing(x, arguments.get("mask")).indices
        expected = output_and_gradients(
            lambda t: self.truth(t, indices=indices, **arguments),
            {"x": x.double(), **self.weights},
            [name for name in wanted if name in self.weights or name == "x"],
        )
        before = {name: len(calls) for name, (_, calls) in self.hooks.items()}
        call = self.attn if call is None else call
        if mode == "grad":
            leaf, parameters = x.clone().requires_grad_(), dict(self.attn.named_parameters())
            with CONTEXTS[context]():
                out = call(leaf, **arguments)
            incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out)
            leaves = [leaf, *(parameters[name] for name in wanted[1:])]
            gradients = torch.autograd.grad(out, leaves, incoming, materialize_grads=True)
            assert_agree({"output": out, **dict(zip(wanted, gradients, strict=True))}, expected, self.tolerance)
        else:
            with MODES[mode](), CONTEXTS[context]():
                out = call(x, **arguments)
            assert_agree({"output": out}, {"output": expected["output"]}, self.tolerance)
        for name, (_, calls) in self.hooks.items():
            assert len(calls) == before[name] + 1, f"the hook on {name} fired {len(calls) - before[name]} times"

    @rule(mode=modes, context=contexts)
    def call(self, mode: str, context: str) -> None:
        self.check(mode, context=context)

    @rule(mode=modes, seed=seeds)
    def call_with_a_mask(self, mode: str, seed: int) -> None:
        length = self.attn.num_prefix_tokens + 9
        self.check(mode, mask=torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < 0.6)

    @rule(mode=modes, HW=st.sampled_from([(1, 9), (9, 1), (3, 3)]))
    def call_with_a_grid(self, mode: str, HW: tuple[int, int]) -> None:
        self.check(mode, HW=HW)

    @rule(mode=modes, grids=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=3))
    def call_with_packed_images(self, mode: str, grids: list[tuple[int, int]]) -> None:
        bounds = [0]
        for rows, columns in grids:
            bounds.append(bounds[-1] + self.attn.num_prefix_tokens + rows * columns)
        self.check(mode, HW=grids, cu_seqlens=bounds)

    @rule(mode=modes)
    def call_with_the_kernels(self, mode: str) -> None:
        before, self.attn.backend = self.attn.backend, "triton"
        if self.dtype == torch.float64 or not interpreter.INTERPRETED:
            with pytest.raises(RuntimeError, match="backend='triton' cannot run"):
                self.attn(torch.randn(1, self.attn.num_prefix_tokens + 9, 8, dtype=self.dtype))
        else:
            self.check(mode)
        self.attn.backend = before

    # --- modes

    @rule(mode=st.booleans())
    def train_or_eval(self, mode: bool) -> None:
        if mode and self.attn.fused:
            with pytest.raises(RuntimeError, match="cannot train after fuse"):
                self.attn.train()
        else:
            assert self.attn.train(mode) is self.attn
        assert self.attn.training == (mode and not self.attn.fused)

    @rule(times=st.integers(1, 2))
    def fuse(self, times: int) -> None:
        for _ in range(times):
            assert self.attn.fuse() is self.attn
        if "dwc" in self.hooks:  # which stays, with its hooks
            assert self.attn.dwc is not None
            assert self.attn.dwc._forward_hooks or self.attn.dwc._forward_pre_hooks
        self.become_fused()

    def become_fused(self) -> None:
        assert self.attn.fused and not self.attn.training
        assert not any(p.requires_grad for p in self.attn.parameters())
        self.exact = self.exact and self.dtype == torch.float64

    @rule(backend=st.sampled_from(["auto", "torch"]))
    def choose_backend(self, backend: str) -> None:
        self.attn.backend = backend

    @rule(data=st.data(), wanted=st.booleans())
    def require_gradients(self, data: st.DataObject, wanted: bool) -> None:
        parameters = dict(self.attn.named_parameters())
        parameter = parameters[data.draw(st.sampled_from(sorted(parameters)))]
        parameter.requires_grad_(wanted)
        if wanted and self.attn.fused:
            with pytest.raises(RuntimeError, match="cannot train after fuse"):
                self.check("grad")
            self.check("no_grad")
            parameter.requires_grad_(False)

    @rule(name=st.sampled_from(SUB_MODULES), kind=st.sampled_from(["pre", "forward", "backward"]), nested=st.booleans())
    def add_or_remove_a_hook(self, name: str, kind: str, nested: bool) -> None:
        """Of any kind; it may call another layer."""
        module = getattr(self.attn, name)
        if name in self.hooks:
            for handle in self.hooks.pop(name)[0]:
                handle.remove()
        elif module is not None:
            calls: list[None] = []
            counts = {"pre": module.register_forward_pre_hook}.get(kind, module.register_forward_hook)
            handles = [counts(lambda *_: calls.append(None))]
            if kind == "backward":
                handles.append(module.register_full_backward_hook(lambda *_: None))
            if nested:
                other, x = DyDiLAttention(8), torch.ones(2, 9, 8)
                handles.append(module.register_forward_pre_hook(lambda *_: (other(x), None)[1]))
            self.hooks[name] = handles, calls

    @rule(name=st.sampled_from(REPLACED))
    def replace_or_restore_a_forward(self, name: str) -> None:
        module = getattr(self.attn, name)
        if name in self.replaced:
            del module.forward
            self.replaced.remove(name)
        elif module is not None:
            forward = module.forward
            module.forward = lambda *args: 2 * forward(*args)
            self.replaced.add(name)

    # --- weights

    @precondition(lambda self: not self.attn.fused)
    @rule(seed=seeds)
    def train_a_step(self, seed: int) -> None:
        """By our gradients and by those of the reference, then cut to few bits."""
        x = torch.randn(2, self.attn.num_prefix_tokens + 9, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            indices = self.attn.routing(x.to(self.dtype)).indices
        trained = {name: p for name, p in self.attn.named_parameters() if p.requires_grad}
        inputs = {"x": x.double(), **self.weights}
        expected = output_and_gradients(lambda t: self.truth(t, indices=indices), inputs, list(trained))
        out = self.attn(x.to(self.dtype))
        incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        if trained:
            optimizer = torch.optim.SGD(trained.values(), lr=1e-3)
            (out * incoming).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, parameter in self.attn.named_parameters():
            stepped = self.weights[name] - 1e-3 * expected[name] if name in trained else self.weights[name]
            assert relative_error(parameter, stepped) <= self.tolerance, name
            with torch.no_grad():
                parameter.copy_(few_bits(parameter))
        self.remember()

    @rule(seed=seeds, assign=st.booleans(), file_format=st.sampled_from(FORMATS))
    def load_other_weights(self, seed: int, assign: bool, file_format: str) -> None:
        """Those of an unfused layer, into the layer as it is."""
        torch.manual_seed(seed)
        other = self.fresh(dtype=torch.float64)
        state = {name: few_bits(t) for name, t in with_distinct_factors(other).state_dict().items()}
        self.weights = {name: t.clone() for name, t in state.items()}
        self.attn.load_state_dict(through_file(cast(state, self.dtype), file_format), assign=assign)
        self.exact = not self.attn.fused or self.dtype == torch.float64

    # --- copies and moves

    @rule(
        file_format=st.sampled_from(FORMATS),
        assign=st.booleans(),
        device=st.sampled_from(["cpu", "meta"]),
        fused=st.booleans(),
    )
    def save_and_load(self, file_format: str, assign: bool, device: str, fused: bool) -> None:
        """Into a new layer, also one that was made on the meta device; a fused state needs a fused layer."""
        state = through_file(self.attn.state_dict(), file_format)
        new = self.fresh(device=device, dtype=self.dtype)
        if self.attn.fused and self.attn.dwc is not None:
            with pytest.raises(RuntimeError, match=r"call fuse\(\) on this module before loading it"):
                new.load_state_dict(state, assign=True)
        if fused or self.attn.fused:
            new.fuse()
        if device == "meta" and not assign:
            new.to_empty(device="cpu")
        result = new.load_state_dict(state, assign=assign)
        assert not result.missing_keys and not result.unexpected_keys
        self.become(new)

    @rule(dtype=dtypes)
    def begin_again(self, dtype: torch.dtype) -> None:
        """An unfused layer with the weights that are remembered."""
        new = self.fresh(dtype=dtype)
        new.load_state_dict(self.weights)
        self.exact = True
        self.become(new)

    @rule(dtype=dtypes)
    def change_dtype(self, dtype: torch.dtype) -> None:
        assert self.attn.to(dtype) is self.attn
        self.exact = self.exact and (not self.attn.fused or dtype == torch.float64)

    @rule()
    def move(self) -> None:
        self.attn.to("cpu")

    @rule(way=st.sampled_from(["deepcopy", "pickle", "torch.save"]))
    def copy(self, way: str) -> None:
        """The whole module, and what is done to the copy is not done to the original."""
        for handles, _ in self.hooks.values():
            for handle in handles:
                handle.remove()  # local functions, which do not pickle
        for name in self.replaced:
            del getattr(self.attn, name).forward
        if way == "deepcopy":
            new = copy.deepcopy(self.attn)
        elif way == "pickle":
            new = pickle.loads(pickle.dumps(self.attn))
        else:
            buffer = io.BytesIO()
            torch.save(self.attn, buffer)
            buffer.seek(0)
            new = torch.load(buffer, weights_only=False)
        assert new.fused == self.attn.fused and new.training == self.attn.training
        with torch.no_grad():
            for parameter in self.attn.parameters():
                parameter.fill_(float("nan"))
        self.become(new)


class LifeWithCompiler(Life):
    """Every call is one of the compiled layer, which follows what is done to the layer."""

    compiled: Any = None

    def check(self, mode: str = "grad", call: nn.Module | None = None, context: str = "none", **arguments: Any) -> None:
        if self.compiled is None or self.compiled._orig_mod is not self.attn:
            self.compiled = torch.compile(self.attn, backend="eager")
        super().check(mode, self.compiled, "none", **arguments)

    def teardown(self) -> None:
        torch._dynamo.reset()


TestLife = Life.TestCase
# A life that fails is printed as it was: to look for a shorter one takes minutes.
TestLife.settings = settings(max_examples=25, stateful_step_count=30, phases=[Phase.generate])
TestLifeWithCompiler = pytest.mark.slow(LifeWithCompiler.TestCase)
TestLifeWithCompiler.settings = settings(max_examples=3, stateful_step_count=12, phases=[Phase.generate])
