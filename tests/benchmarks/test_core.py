"""The suite of the attention core, and the rivals in it against their formulas."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from benchmarks import core, rivals, suite
from benchmarks.roofline import Shape
from dydila_kernels import reference
from dydila_kernels.testing import relative_error

SHAPE = Shape(2, 64, 32, 2, torch.float64)


def tokens() -> list[torch.Tensor]:
    return [torch.randn(2, 64, 32, dtype=torch.float64) for _ in range(3)]


def test_every_contender_gets_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows = core.main(core.Config(smoke=True, device="cpu", threads=1, dim=32, heads=(2,)))
    assert suite.exit_code(rows) == 0
    names = {"dydila", "dydila eager", "softmax", *rivals.BACKENDS, "sana", "focused", *rivals.PACKAGES}
    for mode in suite.MODES:
        assert {row["name"] for row in rows if row["mode"] == mode and row["tokens"] == 256} == names
    skipped = {row["name"]: row["skipped"] for row in rows if row["skipped"]}
    assert skipped.keys() == {"softmax cudnn", "softmax efficient", *rivals.PACKAGES}
    assert all("cannot run" in skipped[name] for name in ("softmax cudnn", "softmax efficient"))
    assert all(skipped[name].startswith("missing") for name in rivals.PACKAGES)
    for row in rows:
        if not row["skipped"]:
            assert row["median_ms"] > 0 and row["heads"] == 2 and row["gb_s"] > 0 and row["peak_mib"] is not None
    checked = {row["name"]: row["error_ratio"] for row in rows if "error_ratio" in row}
    assert checked.keys() >= {"dydila", "softmax", "softmax math", "sana"} and max(checked.values()) <= 2
    assert "mode backward, dim 32" in capsys.readouterr().out


def test_wide_heads_are_left_to_linear_attention() -> None:
    config = core.Config(device="cpu", compiled=False)
    assert set(core.names(config, 384)) == {"dydila", "dydila eager", "sana", "focused"}
    assert set(core.names(core.Config(device="cpu", compiled=True), 64)) >= {"dydila compiled", "sana compiled"}


def test_prepared_calls_pickle() -> None:
    """Memory on a CPU is measured in a fresh process."""
    for comparison in core.comparisons(core.Config(device="cpu", dim=32, heads=(2,), sizes=(16,))):
        for contender in comparison:
            pickle.dumps((contender.prepare, contender.warm_up))


@pytest.mark.parametrize("name", ["softmax", *rivals.BACKENDS])
def test_softmax_is_its_formula(name: str) -> None:
    if name in rivals.BACKENDS and rivals.why_not_softmax(name, "cpu", torch.float64, 16):
        pytest.skip("no such backend on a CPU")
    q, k, v = tokens()
    found = rivals.softmax(q, k, v, heads=2, backend=name)
    assert relative_error(found, rivals.plain_softmax(q, k, v, heads=2)) < 1e-12


def test_sana_is_equation_4_with_relu() -> None:
    q, k, v = tokens()
    weights = rivals.split(q, 2).relu() @ rivals.split(k, 2).relu().mT
    expected = weights / weights.sum(-1, keepdim=True) @ rivals.split(v, 2)
    assert relative_error(rivals.sana(q, k, v, heads=2), rivals.merge(expected)) < 1e-5  # it computes in float32
    assert relative_error(rivals.plain_linear(q, k, v, heads=2), rivals.merge(expected)) < 1e-12


def test_focused_is_the_power_3_of_the_paper_under_equation_4() -> None:
    q, k, v = tokens()
    gamma = torch.full((2, 64), 3.0, dtype=torch.float64)
    qt, kt = reference.power(q, gamma), reference.power(k, gamma)
    expected = reference.linear_attention(qt, kt, v, num_heads=2, normalization="denominator", q_mass=qt, k_mass=kt)
    assert relative_error(rivals.focused(q, k, v, heads=2), expected) < 1e-4  # its epsilons


@pytest.mark.parametrize("attend", [rivals.softmax, rivals.sana])
def test_layers_have_the_shapes_of_ours(attend: rivals.Attention) -> None:
    attn = rivals.Layer(attend, 32, 2)
    assert attn(torch.randn(2, 16, 32)).shape == (2, 16, 32)
    assert set(attn.state_dict()) == {"qkv.weight", "proj.weight", "proj.bias"}


def test_packages_that_are_not_installed_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda _: None)
    assert rivals.missing("flash-attn", SHAPE, "cuda") == "missing: not installed"
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda _: object())
    assert rivals.missing("flash-attn", SHAPE, "cuda") is None
    assert rivals.missing("flash-attn", SHAPE, "cpu") == "missing: it needs a GPU"
    assert "causal only" in str(rivals.missing("flash-linear-attention", SHAPE, "cuda"))


@pytest.mark.parametrize(("name", "module"), [("flash-attn", "flash_attn"), ("flash_bla", "flash_bla")])
def test_adapters_keep_the_layout_of_their_package(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package, written from its documentation."""

    class StandIn:
        @staticmethod
        def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
            assert q.shape == (2, 64, 2, 16) and not causal
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

        @staticmethod
        def linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            assert q.shape == (2, 2, 64, 16) and q.is_contiguous()
            return q @ (k.mT @ v / 64) / (q @ k.mean(-2, keepdim=True).mT + 1e-6)

    monkeypatch.setattr(rivals, "import_module", lambda path: StandIn if path.startswith(module) else None)
    q, k, v = tokens()
    attend, formula, *_ = rivals.RIVALS[name]
    found = attend(q, k, v, heads=2)
    assert relative_error(found, formula(q, k, v, heads=2)) < 1e-4


def test_a_new_size_or_mode_forgets_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch gives up on a function after a few sizes."""
    resets: list[None] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(None))
    config = core.Config(smoke=True, device="cpu", threads=1, dim=32, heads=(2,), modes=("forward", "backward"))
    core.main(config)
    assert len(resets) == 4


def test_a_compiled_contender_is_compiled_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def stand_in(function: rivals.Attention) -> rivals.Attention:
        calls.append("compile")

        def run(*tokens: torch.Tensor, **options: Any) -> torch.Tensor:
            calls.append("call")
            return function(*tokens, **options)

        return run

    monkeypatch.setattr(core, "compiled", stand_in)
    core.prepare(suite.Case("sana compiled", "forward", Shape(1, 16, 32, 2, torch.float32), "cpu"))
    assert calls == ["compile", "call"]
