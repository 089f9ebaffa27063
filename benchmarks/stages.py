"""Each stage of the layer, inside a real call of it, against what libraries have: ``python -m benchmarks.stages``.

    projection           Eqs. 1-2 for Q' and K': route, then multiply each token; against grouped_mm, and all projectors
                         on all tokens
    tokens               Eqs. 5-7: route and measure; of the keys alone where the queries' part belongs to the readout
    state, readout       Eq. 8: Kh^T V and Qh S; against bmm, which is given Kh and Qh
    gradients            of Eqs. 5-8, from dO and V; against autograd, which is given dQh and dKh
    convolution          Eq. 9, added to what is there; against conv2d on channels-last images

"dydila" is a call of the layer, of which the stage alone is timed: its kernels on a GPU, its functions of the torch
backend elsewhere.  KERNELS and FUNCTIONS say which those are, in whatever form; which of them a call takes is found by
:func:`benchmarks.offline.prediction.steps.launched`, and nothing else here knows how the backends work.
"""

from collections.abc import Callable, Iterator, Sequence
from cProfile import Profile
from dataclasses import dataclass
from functools import partial
from itertools import product, takewhile
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import core, harness, kernels, layer, rivals, roofline, suite
from benchmarks.harness import Call
from benchmarks.offline.prediction import steps
from benchmarks.roofline import Cost, passes
from benchmarks.suite import Case, Comparison, Contender
from dydila_kernels import reference
from dydila_kernels.functional import why_not_triton
from dydila_kernels.torch_backend.blocks import choices_of_each
from dydila_kernels.torch_backend.depthwise import ValueBlocks, add_depthwise, gradients
from dydila_kernels.torch_backend.linear_attention import readout, states_of
from dydila_kernels.torch_backend.projection import project_block, project_block_backward, projection_logits
from dydila_kernels.torch_backend.tokens import tokens_of

HEADLESS = ("projection", "convolution")  # stages without heads, which have all modes
PROJECTORS = 3  # as in the layer by default

ROUTED = ("prepare_kernel", "tokens_kernel", "gluon_tokens_kernel")
KERNELS = {
    "projection": (
        "route_kernel", "count_kernel", "rank_kernel", "project_kernel", "weight_gradient_kernel", "sum_partials_kernel"
    ),
    "tokens": ROUTED,
    "state": ("state_kernel",),
    "readout": ("readout_kernel", "product_kernel"),
    "gradients": ("gluon_dots_kernel", "state_kernel", "gradients_kernel", "gluon_gradients_kernel"),
    "convolution": ("taps_kernel", "depthwise_kernel", "depthwise_gradients_kernel"),
}  # fmt: skip
"""What a stage launches, in the mode that it is of.  Where there is no such launch, state and readout are what torch
does after the tokens of the keys, and of the queries."""
FUNCTIONS: dict[str, tuple[Callable[..., Any], ...]] = {
    "projection": (choices_of_each, projection_logits, project_block, project_block_backward),
    "tokens": (tokens_of,),
    "state": (states_of,),
    "readout": (readout,),
    "convolution": (ValueBlocks.convolve, add_depthwise, gradients),
}
"""What a stage calls in :mod:`dydila_kernels.torch_backend`; none of them calls another of its stage."""


@dataclass(frozen=True)
class Config(suite.Options):
    """Each stage of the layer, inside a real call of it, against what libraries have for it."""

    dim: int = 384  # Channels d.
    heads: tuple[int, ...] = ()  # Heads to measure with, where a stage has them; by default 1 and DIM/64.
    stages: tuple[str, ...] = tuple(KERNELS)  # Stages to measure.


def runs_kernels(case: Case) -> bool:
    """Whether "dydila" is the kernels."""
    return harness.is_gpu(case.device) and why_not_triton(torch.device(case.device), case.shape.dtype) is None


def launched(case: Case, mode: str) -> list[str]:
    """The kernels of a call of the layer in this mode, in order; none where the torch backend takes it."""
    if not runs_kernels(case):
        return []
    from dydila_kernels.ops import forms

    shape = case.shape
    setting = steps.Setting(shape.batch, shape.tokens, shape.dim, shape.heads, form=forms.wanted())
    return steps.launched(setting, shape.dtype)[mode]


def is_fused(case: Case) -> bool:
    """Whether the readout makes Qh as it goes; else Qh and Kh are written once."""
    return "readout_kernel" in launched(case, "forward")


def sides_of(case: Case) -> str:
    """Whose tokens the stage is about: "q", "k" or both."""
    if case.stage == "readout":
        return "q"
    return "k" if case.stage == "state" or (case.stage == "tokens" and is_fused(case)) else "qk"


def comparisons(config: Config) -> Iterator[Comparison]:
    sizes = config.lengths(cpu=(256, 1024, 4096), gpu=(256, 1024, 4096, 16384, 65536))
    for stage, mode, tokens in product(config.stages, config.modes, sizes):
        if stage in HEADLESS or mode == ("backward" if stage == "gradients" else "forward"):
            heads = (1,) if stage in HEADLESS else suite.heads_of(config.heads, config.dim)
            who = [(name, h) for h in heads for name in ("dydila", *RIVALS[stage])]
            yield [contender(case) for case in suite.cases(config, mode, tokens, config.dim, who, stage)]


def contender(case: Case) -> Contender:
    labels = case.labels
    if case.stage in HEADLESS:
        del labels["heads"]
    if case.name == "dydila":
        prepare, check = partial(layer.prepare, case), partial(layer.error_ratio, case.checked)
        return Contender(prepare, labels, cost(case), check, why_missing(case), clock=clock_of(case))
    missing = "missing: not in this torch" if case.name == "grouped_mm" and not hasattr(F, "grouped_mm") else None
    return Contender(partial(RIVALS[case.stage][case.name], case), labels, cost(case), missing=missing, graph=True)


def why_missing(case: Case) -> str | None:
    """Why a call of the layer does not show the stage; None: it does."""
    stage, shape, here = case.stage, case.shape, runs_kernels(case)
    if not here and stage not in FUNCTIONS:
        return "missing: the kernels need a GPU, and for the torch backend this is no stage of its own"
    if not here and harness.is_gpu(case.device):
        return "missing: the torch backend shows its stages on a CPU only"
    by_torch = stage in ("state", "readout") and {*launched(case, "forward")}.isdisjoint(KERNELS[stage])
    if by_torch and shape.tokens < shape.dim // shape.heads:
        return "missing: the products come in the order (Q K^T) V, which is cheaper here"
    return None


def cost(case: Case) -> Cost:
    """What a stage moves and computes: of ours as dydila_kernels/ops/README.md counts, of a rival what it is given."""
    _, mode, shape, _, stage = case
    d, e = shape.dim, shape.dim // shape.heads
    taps, routing = 2 * 9 * d, 2 * d * 4 * core.FACTORS
    if stage == "projection":
        route = passes(shape, 0, 0 if mode == "backward" else 2 * d * PROJECTORS)
        return (roofline.linear(shape.rows, d, d, mode, shape.dtype, weights=PROJECTORS) + route) * 2
    if stage == "convolution":  # what is there is read, too, and the weight has a gradient of its own
        return roofline.by_mode(mode, passes(shape, 3, taps), passes(shape, 4, 2 * taps))
    if stage == "gradients":
        by_torch = case.name != "dydila" or {*launched(case, "backward")}.isdisjoint(KERNELS["gradients"][:2])
        return passes(shape, 10, 0) if by_torch else roofline.core(shape, "backward")
    if case.name == "dydila" and is_fused(case):
        return {
            "tokens": passes(shape, 2, routing),
            "state": passes(shape, 3, 2 * d * e),
            "readout": passes(shape, 3, 2 * d * e + routing),
        }[stage]
    if stage == "tokens":
        return passes(shape, 3, routing) * len(sides_of(case))
    return passes(shape, 2, 2 * d * e) + Cost(shape.batch * d * e * shape.dtype.itemsize, 0)


def clock_of(case: Case) -> Callable[[Call], float]:
    """Times what a call spends in the stage; it raises RuntimeError where the call has no such part."""
    if not runs_kernels(case):
        return partial(profiled_seconds, FUNCTIONS.get(case.stage, ()))
    return partial(launched_seconds, case.stage, case.device)


def profiled_seconds(functions: Sequence[Callable[..., Any]], call: Call) -> float:
    """By Python's profiler: what these functions take, with what they call."""
    profile = Profile()
    profile.runcall(call)
    codes = [function.__code__ for function in functions]
    seconds = [entry.totaltime for entry in profile.getstats() if entry.code in codes]
    if not seconds:
        raise RuntimeError(f"the call went through none of {', '.join(f.__qualname__ for f in functions)}")
    return sum(seconds)


def launched_seconds(stage: str, device: str, call: Call) -> float:
    """What the launches of a stage take on the device; RuntimeError where the call has none."""
    return seconds_of(stage, kernels.timed(call, device))


def seconds_of(stage: str, spans: Sequence[kernels.Span]) -> float:
    """Of what ran during a call, that of the stage."""
    found = [seconds for name, seconds in spans if name in KERNELS[stage]]
    if not found and stage in ("state", "readout"):
        ours = {name for names in KERNELS.values() for name in names}
        ends = [i for i, (name, _) in enumerate(spans) if name in ROUTED[1:]]
        after = spans[ends[0 if stage == "state" else -1] + 1 :] if ends else ()
        found = [seconds for _, seconds in takewhile(lambda span: span[0] not in ours, after)]
    if not found:
        raise RuntimeError(f"the call launched none of {', '.join(KERNELS[stage])}")
    return sum(found)


def products(case: Case) -> Call:
    """Eq. 8 by bmm, which is given Zh."""
    inputs = core.random_inputs(case.shape, case.device)
    z, v = (rivals.split(inputs[key], case.shape.heads) for key in (sides_of(case), "v"))
    states = z.mT @ v / case.shape.tokens
    return torch.inference_mode()((lambda: z.mT @ v) if case.stage == "state" else (lambda: rivals.merge(z @ states)))


def equations(case: Case) -> Call:
    """Eqs. 5-8 up to Zh in plain PyTorch, routing and all; the gradients are given that of Zh."""
    inputs, sides = core.random_inputs(case.shape, case.device), sides_of(case)
    leaves = [inputs[key] for side in sides for key in (side, f"{side}_redundant")] + [inputs["gamma"], inputs["lam"]]
    incoming = [inputs["v"]] * len(sides)
    return suite.call_of(case.mode, lambda: [z_hat(side, inputs) for side in sides], leaves, *incoming)


def z_hat(side: str, inputs: dict[str, Tensor]) -> Tensor:
    number, routers = "qk".index(side), inputs["kernel_routers"]
    z, redundant = (
        reference.power(t, reference.choose(inputs["gamma"], reference.route(t, routers[2 * i + number])))
        for i, t in enumerate((inputs[side], inputs[f"{side}_redundant"]))
    )
    index = reference.route(torch.cat([z, redundant], -1), inputs["differential_routers"][number])
    return reference.difference(z, redundant, reference.choose(inputs["lam"], index))


def grouped(x: Tensor, weight: Tensor, router: Tensor) -> Tensor:
    """Sorted by projector, multiplied by ``grouped_mm``, put back."""
    rows = x.flatten(0, 1)
    index = reference.route(rows, router)
    order = index.argsort(stable=True)
    counts = (index[:, None] == torch.arange(len(weight), device=x.device)).sum(0)
    y = F.grouped_mm(rows.index_select(0, order), weight, offs=counts.cumsum(0, dtype=torch.int32))
    return torch.empty_like(y).index_copy_(0, order, y).view_as(x)


def dense(x: Tensor, weight: Tensor, router: Tensor) -> Tensor:
    """Every projector on every token, then the choice."""
    return reference.project(x, weight, reference.route(x, router))


def projections(project: rivals.Attention, case: Case) -> Call:
    """Q' and K' of the same tokens."""
    d, inputs = case.shape.dim, core.random_inputs(case.shape, case.device)
    x, grad = inputs["q"], inputs["v"]
    sizes = 2 * ((PROJECTORS, d, d), (d, PROJECTORS))
    w_q, r_q, w_k, r_k = (torch.randn(size, device=x.device, dtype=x.dtype) * d**-0.5 for size in sizes)
    return suite.call_of(case.mode, lambda: [project(x, w_q, r_q), project(x, w_k, r_k)], [x, w_q, w_k], grad, grad)


def convolve(case: Case) -> Call:
    """``out + DWC(V)``, written into ``out``; tokens are images in the channels-last layout as they lie."""
    inputs, side = core.random_inputs(case.shape, case.device), isqrt(case.shape.tokens)
    v, out = inputs["v"], inputs["q"]
    weight = torch.randn(case.shape.dim, 1, 3, 3, device=v.device, dtype=v.dtype) / 3
    dwc = partial(reference.depthwise, v, weight, None, (side, side))
    return suite.call_of(case.mode, lambda: out.detach().add_(dwc()), [v, weight], inputs["k"])


RIVALS: dict[str, dict[str, Callable[[Case], Call]]] = {
    "projection": {"grouped_mm": partial(projections, grouped), "dense": partial(projections, dense)},
    "tokens": {"dydila eager": equations},
    "state": {"bmm": products},
    "readout": {"bmm": products},
    "gradients": {"dydila eager": equations},
    "convolution": {"conv2d": convolve},
}
"""Who else is measured, by stage and name."""

main = partial(suite.run, "stages", comparisons)

if __name__ == "__main__":
    suite.command(main, Config)
