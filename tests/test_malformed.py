"""State dicts that do not fit are refused, by name and before anything is loaded, and files are never unpickled."""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dydila_kernels import DyDiLAttention

State = dict[str, Any]


def layer(fused: bool = False, **configuration: Any) -> DyDiLAttention:
    attn = DyDiLAttention(8, 2, **configuration)
    return attn.fuse() if fused else attn


def spoilt(state: State, **changes: Any) -> State:
    """With values set under keys whose dots are written as ``__``; None takes a key out."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in {**state, **changes}.items() if value is not None}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"measure__gamma": None}, "Missing key.*measure.gamma"),
        ({"measure__gamma": torch.ones(4)}, "size mismatch for measure.gamma"),
        ({"measure__gamma": 3.0}, "measure.gamma.*expected torch.Tensor"),
        ({"measure__delta": torch.ones(9)}, "Unexpected key.*measure.delta"),
        ({"measure__packed": torch.ones(4, 8, 9)}, "Unexpected key.*measure.packed"),
        ({"qkv__weight": torch.ones(24, 16)}, "size mismatch for qkv.weight"),
        ({"../../evil": torch.ones(1)}, "Unexpected key.*evil"),
    ],
    ids=str,
)
def test_load_state_dict_is_strict(changes: State, message: str, assign: bool, fused: bool) -> None:
    attn = layer(fused)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        attn.load_state_dict(spoilt(layer(fused).state_dict(), **changes), assign=assign)


BRANCHES: list[State] = [
    {"dwc__branches__1x3": None},
    {"dwc__branches__1x1": torch.ones(8, 1, 1, 1)},
    {"dwc__branches__5x5": torch.ones(8, 1, 5, 5)},
    {"dwc__branches__3x3": torch.ones(1, 1, 3, 3)},
    {"dwc__branches__3x3": torch.ones(16, 1, 3, 3)},
    {"dwc__branches__1x3": torch.ones(8, 1, 3, 1), "dwc__branches__3x1": torch.ones(8, 1, 1, 3)},
    {"dwc__branches__3x3": "3x3"},
]


@pytest.mark.parametrize("changes", BRANCHES, ids=lambda changes: "-".join(changes))
@pytest.mark.parametrize("fused", [False, True])
def test_branches_that_are_not_those_of_the_layer(changes: State, fused: bool) -> None:
    """A fused layer sums those of its configuration, in their shapes, or none."""
    attn = layer(fused)
    before = copy.deepcopy(attn.state_dict())
    with pytest.raises(RuntimeError, match=r"dwc\."):
        attn.load_state_dict(spoilt(layer().state_dict(), **changes))
    assert not fused or torch.equal(attn.state_dict()["dwc.weight"], before["dwc.weight"])


def test_the_sum_of_assigned_branches_keeps_their_precision() -> None:
    """Into a fused layer in float32, assigned: the layer becomes float64 as a whole."""
    attn, state = layer(fused=True), layer().double().state_dict()
    attn.load_state_dict(state, assign=True)
    assert {parameter.dtype for parameter in attn.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    "change, kind, message",
    [
        (lambda t: t.int(), TypeError, r"state_dict\['proj.weight'\] must have one of the dtypes .*; got int32"),
        (lambda t: t.to(torch.complex64), TypeError, r"state_dict\['proj.weight'\] must .*; got complex64"),
        (lambda t: t.tolist(), TypeError, r"state_dict\['proj.weight'\] must be a tensor; got list"),
        (lambda t: t[:4], RuntimeError, r"size mismatch for proj.weight: .* \(8, 8\); got \(4, 8\)"),
        (lambda t: t[0], RuntimeError, r"size mismatch for proj.weight"),
    ],
)
def test_load_attention_loads_all_or_nothing(
    change: Callable[[Tensor], Any], kind: type[Exception], message: str
) -> None:
    attn = layer(qkv_bias=True)
    before = copy.deepcopy(attn.state_dict())
    state = {name: t + 1 for name, t in attn.state_dict().items() if name.startswith(("qkv", "proj."))}
    with pytest.raises(kind, match=message):
        attn.load_attention({**state, "proj.weight": change(state["proj.weight"])})
    assert all(torch.equal(t, before[name]) for name, t in attn.state_dict().items())
    attn.load_attention({name: t.double() for name, t in state.items()})
    assert torch.equal(attn.proj.weight, before["proj.weight"] + 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["qkv.weight", "projection_q.weight", "measure.gamma", "differential.lam", "dwc.weight"]
)
@pytest.mark.parametrize("fused", [False, True])
def test_weights_that_are_not_finite_show_in_the_output(name: str, value: float, fused: bool) -> None:
    """They load, as into any module of torch, but no mask, maximum or quotient hides them."""
    for normalization in ("length", "denominator"):
        attn = layer(normalization=normalization)
        name = name.replace("dwc.weight", "dwc.branches.3x3")
        attn.load_state_dict({**attn.state_dict(), name: torch.full_like(attn.state_dict()[name], value)})
        out = (attn.fuse() if fused else attn)(torch.randn(1, 9, 8))
        assert not out.isfinite().all()


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def test_the_documented_way_to_load_executes_nothing(tmp_path: Path) -> None:
    """``torch.load`` with ``weights_only=True``, its default, and ``load_state_dict``."""
    marker = tmp_path / "executed"
    buffer = io.BytesIO()
    torch.save({**layer().state_dict(), "measure.gamma": Bomb(marker)}, buffer)
    buffer.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        layer().load_state_dict(torch.load(buffer, weights_only=True))
    assert not marker.exists()


def test_no_code_of_the_package_unpickles() -> None:
    package = Path(__file__).parents[1] / "dydila_kernels"
    for file in package.rglob("*.py"):
        source = file.read_text()
        for call in ("torch.load", "pickle.load", "import pickle", "np.load", "eval(compile", "exec("):
            assert call not in source, f"{file} has {call}"
