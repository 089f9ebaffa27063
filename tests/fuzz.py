"""Random configurations and inputs against the reference: ``python -m tests.fuzz --count 10000 --seed 0``.

Case K of a seed depends on nothing else, so that a failure is repeated by ``--seed S --case K``.  The oracle is the
reference in float64 with our routing decisions.  A result is right if its error is of the size of what rounding does:
of the error of the same equations in plain PyTorch in the same dtype, or of the change of the oracle when every input
is rounded once more.  Errors are taken per token, so that a large token does not hide a small one.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import tests.interpreter as interpreter  # before the package, which may import Triton
from dydila_kernels import reference
from dydila_kernels.precision import accumulation_dtype
from dydila_kernels.testing import TOKENS, Tensors, cast, relative_error
from dydila_kernels.torch_backend import blocks
from tests.fuzz_cases import DEVICE, Case, Draw, as_list, draw_core, draw_layer

MARGIN = 8.0
"""How many times the error that rounding made in a draw is still right: ours may be the largest of thousands."""


class Wrong(AssertionError):
    """What the case shows to be wrong."""


def results(function: Callable[[Tensors], Tensor], inputs: Mapping[str, Tensor], wanted: Sequence[str]) -> Tensors:
    """The output, and the gradients of those inputs that are wanted; the others do not require any."""
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items()}
    out = function(leaves)
    found = {"output": out.detach()}
    if wanted and out.requires_grad:
        incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out)
        gradients = torch.autograd.grad(out, [leaves[name] for name in wanted], incoming, materialize_grads=True)
        found.update(zip(wanted, gradients, strict=True))
    return found


def rows_of(name: str, t: Tensor) -> Tensor:
    """In float64: the tokens one by one, a parameter as a whole."""
    t = t.detach().double()
    return t.flatten(0, 1) if name in ("output", "x", *TOKENS) else t.reshape(1, -1)


def size(t: Tensor) -> Tensor:
    """The norm of each row, without leaving the range of float64."""
    largest = t.abs().amax(-1, keepdim=True) if t.shape[-1] else t.new_zeros(len(t), 1)
    return (largest * torch.linalg.vector_norm(t / largest.where(largest > 0, 1), dim=-1, keepdim=True))[:, 0]


class Rounded(torch.autograd.Function):
    """Every number between 1 and 2 ``step`` larger or smaller, and every number of the gradient, too."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, step: float, draw: Draw) -> Tensor:
        ctx.step, ctx.draw = step, draw
        return t * Rounded.factors(t, step, draw)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * Rounded.factors(grad, ctx.step, ctx.draw), None, None

    @staticmethod
    def factors(t: Tensor, step: float, draw: Draw) -> Tensor:
        n = draw.normal(*t.shape).to(t)
        return 1 + step * n.sign() * (1 + n.abs().clamp(max=1))


@contextmanager
def rounding(eps: float, draw: Draw) -> Iterator[Callable[[Any], Any]]:
    """Within, the stages of the reference round what they take and give; so does the function for tensors by name."""
    # Numbers in 16 bits are rounded between the stages only; wider ones lose more, in the sums within a stage.
    step = eps / 4 if eps > 1e-4 else 32 * eps

    def rounded(value: Any) -> Any:
        if isinstance(value, Tensor):
            return Rounded.apply(value, step, draw) if value.is_floating_point() else value
        return {name: rounded(t) for name, t in value.items()} if isinstance(value, Mapping) else value

    def rounds(stage: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: rounded(stage(*map(rounded, args), **rounded(kwargs)))

    stages = {
        name: rounds(getattr(reference, name))
        for name in ("project", "power", "difference", "rotate", "linear_attention")
    }
    with mock.patch.multiple(reference, **stages):
        yield rounded


class Judge:
    """The oracle of a case, and the error that rounding makes for each row of each result."""

    def __init__(self, case: Case, draw: Draw) -> None:
        self.case, self.at = case, case.decide()
        dtype = next(iter(case.inputs.values())).dtype
        self.limits = torch.finfo(dtype)
        exact = cast(case.inputs, torch.float64)
        self.oracle = results(self.equations, exact, case.wanted)
        self.plain = results(self.equations, case.inputs, case.wanted)
        self.rounding: Tensors = {}
        self.close = False
        logits, slack = case.logits(exact, self.at), {}
        for _ in range(2):
            with rounding(case.eps, draw) as rounded:
                shaken = results(lambda t: self.equations(rounded(t)), exact, case.wanted)
                shaken_logits = case.logits(rounded(exact), self.at)
            for name, t in shaken.items():
                change = size(rows_of(name, t) - rows_of(name, self.oracle[name]))
                self.rounding[name] = torch.maximum(change, self.rounding.get(name, change))
            for name, t in shaken_logits.items():
                change = (t - logits[name]).abs().amax(-1) + case.eps * logits[name].abs().amax(-1)
                slack[name] = torch.maximum(change, slack.get(name, change))
        for name, t in logits.items():
            self.judge_decisions(name, t, MARGIN * slack[name])

    def judge_decisions(self, name: str, logits: Tensor, slack: Tensor) -> None:
        """The logit that was chosen is the largest, to rounding, and the first of those that all are zero."""
        at = self.at[name]
        if at.shape != logits.shape[:-1] or (at < 0).any() or (at >= logits.shape[-1]).any():
            raise Wrong(f"{name}: decisions {tuple(at.shape)} for logits {tuple(logits.shape)}")
        best = logits.topk(min(2, logits.shape[-1]), -1).values
        if (best[..., 0] - logits.gather(-1, at[..., None])[..., 0] > slack).any():
            raise Wrong(f"{name}: a token was sent where its logit is not the largest")
        if at[(logits == 0).all(-1)].any():
            raise Wrong(f"{name}: of equal logits not the first was chosen")
        self.close |= bool(((best[..., 0] - best[..., -1] <= slack) & (best[..., 0] != 0)).any()) and best.shape[-1] > 1

    def equations(self, t: Tensors) -> Tensor:
        return self.case.plain(t, self.at)

    def excess(self, name: str, found: Tensor) -> float:
        """The largest error over what is allowed; NaN where a result is not finite that should be."""
        exact, plain = rows_of(name, self.oracle[name]), rows_of(name, self.plain[name])
        if not exact.numel():
            return 0.0
        sizes, of_plain = size(exact), size(plain - exact)
        # Where the dtype may not hold what lies on the way, nothing is asked.
        held = exact.isfinite().all(-1) & (sizes < self.limits.max / 2**10)
        if self.case.about["normalization"] == "denominator":  # by a mass that is as good as none
            held &= plain.isfinite().all(-1)
        error = size(rows_of(name, found) - exact)
        noise = torch.maximum(self.rounding[name], of_plain.nan_to_num(0, 0, 0)) + self.case.eps * sizes
        # Terms of second order may stand where the oracle has zeros, as for gamma where d = 1; of first order in the
        # gradient of a router, p (T - sum p T), where p is 1.
        order = 1 if "router" in name and self.case.about["router_gradient"] == "straight_through" else 2
        noise += self.case.eps**order * max(t.nan_to_num(0, 0, 0).norm().item() for t in self.oracle.values())
        # Of what is that small, parts may be lost on the way; and without a gradient zeros may be powers of the
        # smallest normal number, which beside the largest token are nothing.
        lost = 2**20 * torch.finfo(accumulation_dtype(found.dtype)).tiny
        small = max(self.limits.tiny, lost, 2**10 * lost * sizes[held].max().item() if held.any() else 0)
        allowed = MARGIN * noise + small * math.sqrt(exact.shape[-1])
        worst = (error / allowed)[held]
        return 0.0 if not len(worst) else math.nan if worst.isnan().any() else worst.max().item()

    def verdict(self, name: str, found: Tensor, way: str) -> Counter[str]:
        """Raises Wrong, or counts the comparison.

        A computation may round its tokens otherwise than the one that told the decisions, and so decide otherwise where
        two choices are as good as one another.
        """
        excess = self.excess(name, found)
        if excess <= 1:
            return Counter({way: 1})
        if self.close and found.isfinite().all():
            return Counter({"decided otherwise": 1})
        raise Wrong(f"{name}, {way}: the error is {excess:.3g} of what is allowed")


def check(case: Case, draw: Draw) -> Counter[str]:
    """Raises Wrong, or tells what was compared."""
    before = {name: t.clone() for name, t in case.inputs.items()}
    judge = Judge(case, draw)
    found = results(case.ours, case.inputs, case.wanted)
    said = Counter[str]()
    if found.keys() != judge.oracle.keys():
        raise Wrong(f"gradients of {sorted(found)}, but the reference has those of {sorted(judge.oracle)}")
    for name, t in found.items():
        if t.shape != judge.oracle[name].shape:
            raise Wrong(f"{name}: shape {tuple(t.shape)}, not {tuple(judge.oracle[name].shape)}")
        said += judge.verdict(name, t, "gradients" if name != "output" else name)
    for way, call in case.others.items():
        said += judge.verdict("output", call(), way)
    for name, t in case.inputs.items():
        if not torch.equal(t.nan_to_num(), before[name].nan_to_num()):
            raise Wrong(f"{name} was changed by the call")
    return said


def check_spread(draw: Draw, backend: str) -> Counter[str]:
    """NaN or infinity in a token: the output of its image tells so, and no other image is touched."""
    while True:
        case = draw_layer(draw, backend)
        x, arguments = case.inputs["x"], case.about
        bounds = as_list(arguments.get("cu_seqlens"))
        if bounds is None:
            images = [(b, slice(None)) for b in range(len(x))]
        else:
            images = [(0, slice(start, stop)) for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
        mask = arguments.get("mask")
        seen = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        images = [at for at in images if seen[at].any()]
        if images:
            break
    at, value = draw.choice(images), draw.choice([math.nan, math.inf, -math.inf])
    token = draw.choice(seen[at].nonzero().flatten().tolist()) + (at[1].start or 0)
    x = x.contiguous()
    spoilt = x.clone()
    spoilt[at[0], token] = value
    inside = torch.zeros_like(seen)
    inside[at] = True
    for way in ("grad", "no_grad"):
        with torch.set_grad_enabled(way == "grad"):
            clean, out = (case.ours({**case.inputs, "x": t.clone()}) for t in (x, spoilt))
        # To rounding: a token that is sent to another projector changes the sizes of the matrix products.
        if not relative_error(out[~inside], clean[~inside]) <= math.sqrt(case.eps):
            raise Wrong(f"{way}: {value} in image {at} changed another image")
        if out[inside & seen].isfinite().any(-1).any():
            raise Wrong(f"{way}: {value} in a token of image {at} is not seen in all of its outputs")
    return Counter({"spread": 1})


# --- running


@contextmanager
def blocks_of(elements: int) -> Iterator[None]:
    """So small that images span several."""
    with mock.patch.object(blocks, "CPU_BLOCK", elements), mock.patch.object(blocks, "DEVICE_BLOCK", elements):
        yield


def run_case(seed: int, number: int) -> tuple[str, Counter[str], str | None]:
    """The kind of the case, what was compared, and what is wrong, if anything is."""
    draw = Draw(f"{seed}/{number}")
    kernels = DEVICE == "cuda" or interpreter.INTERPRETED
    # The interpreter takes a second a case.
    backend = "triton" if kernels and draw.chance(0.5 if DEVICE == "cuda" else 0.02) else "torch"
    kind = draw.choice(["layer"] * 12 + ["core"] * 7 + ["spread"])
    about: Any = None
    try:
        with blocks_of(draw.choice([60, 500, 2**20])):
            if kind == "spread":
                said = check_spread(draw, backend)
            else:
                case = (draw_layer if kind == "layer" else draw_core)(draw, backend)
                about = case.about
                said = check(case, draw)
    except Exception as error:  # whatever goes wrong is what the fuzzer is to find
        return kind, Counter(), f"{type(error).__name__}: {error}\n  {about}"
    return f"{kind}, {backend}", said, None


def fuzz(count: int, seed: int, report: Callable[[str], None] = print) -> list[int]:
    """Runs cases 0 to ``count - 1`` and returns the numbers of those that failed."""
    said, failed, start = Counter[str](), [], time.monotonic()
    for number in range(count):
        kind, compared, wrong = run_case(seed, number)
        said += compared
        said[kind] += 1
        if wrong is not None:
            failed.append(number)
            report(f"python -m tests.fuzz --seed {seed} --case {number}: {wrong}")
        if (number + 1) % 1000 == 0:
            report(f"{number + 1} cases, {len(failed)} failed, {time.monotonic() - start:.0f} s")
    report(f"{count} cases of seed {seed} on {DEVICE}: {len(failed)} failed; {dict(sorted(said.items()))}")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="cases to run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (default: %(default)s)")
    parser.add_argument("--case", type=int, help="run this case alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case is None:
        sys.exit(1 if fuzz(options.count, options.seed, partial(print, flush=True)) else 0)
    kind, said, wrong = run_case(options.seed, options.case)
    sys.exit(wrong or print(f"case {options.case} of seed {options.seed} ({kind}) is right: {dict(said)}"))


if __name__ == "__main__":
    main()
