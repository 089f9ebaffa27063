"""The attention core, given its tokens, against softmax and linear attention: ``python -m benchmarks.core``.

Ours takes q, k, v, q', k' (B, N, d); "dydila eager" and "dydila compiled" are the equations of
:mod:`dydila_kernels.reference` in the dtype of the tokens, without and with ``torch.compile``.  The rivals take q, k
and v.  Gradients are those of the tokens, and for ours of the tables gamma and lambda.  Heads of more than 256 channels
are left to linear attention: fused softmax has none so wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product

import torch
from torch import Tensor

from benchmarks import rivals, roofline, suite
from benchmarks.harness import Call, Row
from benchmarks.roofline import Shape
from benchmarks.suite import Case, Comparison, Contender
from dydila_kernels import dydila_attention, reference
from dydila_kernels.testing import TOKENS, cast, core_inputs, decisions, error_ratios, output_and_gradients

OURS = ("dydila", "dydila eager", "dydila compiled")
FACTORS = 9
"""Entries of gamma and of lambda, as in the layer by default."""
CHECKED_TOKENS = 32**2
"""Tokens of the image that the check is done on at most: longer ones take the same path."""


@dataclass(frozen=True)
class Config(suite.Options):
    """The attention core, given its tokens, against softmax and linear attention."""

    dim: int = 384
    """Channels d."""
    heads: tuple[int, ...] = ()
    """Heads to measure with; by default 1 and DIM/64."""
    compiled: bool = torch.cuda.is_available()
    """Measure under torch.compile too; by default where there is a GPU.  Each size is compiled anew, which takes long
    and, on a CPU, a C++ compiler."""


def main(config: Config) -> list[Row]:
    """Check, measure, print tables and store the rows."""
    return suite.run("core", config, list(comparisons(config)))


def comparisons(config: Config) -> Iterator[Comparison]:
    heads = suite.heads_of(config.heads, config.dim)
    who = [(name, h) for h in heads for name in names(config, config.dim // h)]
    sizes = config.lengths(cpu=(256, 1024, 4096, 16384), gpu=(256, 1024, 4096, 16384, 65536))
    for tokens, mode in product(sizes, config.modes):
        yield suite.comparison(config, mode, tokens, config.dim, who, contender, inputs=3)


def names(config: Config, head_dim: int) -> list[str]:
    """Who is measured with heads of this width; 256 channels are the most that fused softmax takes."""
    compiled = ["dydila compiled", "sana compiled"] if config.compiled else []
    everyone = [*OURS[:2], *rivals.SOFTMAX, "sana", "focused", *compiled, *rivals.PACKAGES]
    return [name for name in everyone if head_dim <= 256 or not (name in rivals.SOFTMAX or name in rivals.PACKAGES)]


def contender(case: Case) -> Contender:
    name, _, shape, device, _ = case
    labels: Row = {"name": name, "heads": shape.heads}
    missing = None
    if name in rivals.PACKAGES:
        labels["computes"] = rivals.RIVALS[name].computes
        missing = rivals.missing(name, device)
    if name in rivals.BACKENDS:
        missing = rivals.why_not_softmax(name, device, shape.dtype, shape.dim // shape.heads)
    checked = case.one_of(min(shape.tokens, CHECKED_TOKENS), "forward")
    rival = rivals.RIVALS.get(name)
    check = error_ratio if name == "dydila" else rival_error_ratio if rival and rival.formula else None
    return Contender(
        partial(prepare, case),
        labels,
        cost(case),
        check and partial(check, checked),
        missing,
        suite.warm_up(prepare, case),
        graph=True,
    )


def cost(case: Case) -> roofline.Cost:
    name = case.name.removesuffix(" compiled")
    return (roofline.core if case.name in OURS else rivals.RIVALS[name].cost)(case.shape, case.mode)


def prepare(case: Case) -> Call:
    """What is timed, on random inputs of its own."""
    name, mode, shape, device, _ = case
    inputs = random_inputs(shape, device)
    tokens = [inputs.pop(key) for key in TOKENS][: 5 if name in OURS else 3]
    attend = compiled(function_of(name)) if "compiled" in name else function_of(name)
    attend = partial(attend, num_heads=shape.heads, **inputs) if name in OURS else partial(attend, heads=shape.heads)
    leaves = [*tokens, inputs["gamma"], inputs["lam"]] if name in OURS else tokens
    for leaf in leaves:
        leaf.requires_grad_(mode != "forward")
    # The queries double as the gradient that comes in, which saves their memory.
    call = suite.call_of(mode, lambda: attend(*tokens), leaves, tokens[0].detach())
    if "compiled" in name:
        call()  # compiles
    return call


def random_inputs(shape: Shape, device: str) -> dict[str, Tensor]:
    """Arguments of the core by name, the same in every call, made on the device."""
    torch.manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, device=device, dtype=shape.dtype) * scale

    tokens = {name: normal(shape.batch, shape.tokens, shape.dim) for name in TOKENS}
    return tokens | {
        "gamma": torch.linspace(1, 4, FACTORS, device=device).to(shape.dtype),
        "lam": normal(FACTORS, scale=0.3),
        "kernel_routers": normal(4, shape.dim, FACTORS, scale=shape.dim**-0.5),
        "differential_routers": normal(2, 2 * shape.dim, FACTORS, scale=shape.dim**-0.5),
    }


def function_of(name: str) -> rivals.Attention:
    """What is called: of ours with the keywords of the core, of others with q, k, v and ``heads``."""
    if name in OURS:
        return dydila_attention if name == "dydila" else reference.dydila_attention
    return rivals.RIVALS[name.removesuffix(" compiled")].attend


@cache
def compiled(function: rivals.Attention) -> rivals.Attention:
    """Once: torch would compile another object of the same function again."""
    return torch.compile(function, dynamic=False, fullgraph=True)


@cache
def error_ratio(case: Case) -> float:
    """Our error over that of the equations in plain PyTorch in the same dtype and with the same decisions.

    The worse of two ratios: that of the output, and that of the gradients of tokens and tables together.
    """
    shape = case.shape
    inputs = core_inputs(
        shape.batch, shape.tokens, shape.dim, num_kernel_factors=FACTORS, num_differential_factors=FACTORS,
        dtype=shape.dtype, device=case.device,
    )  # fmt: skip
    wanted = [name for name in inputs if "routers" not in name]
    indices = decisions(inputs, num_heads=shape.heads)

    def ours(t: dict[str, Tensor]) -> Tensor:
        return dydila_attention(**t, num_heads=shape.heads)  # type: ignore[arg-type]

    def equations(t: dict[str, Tensor]) -> Tensor:
        at = {name: index.to(t["q"].device) for name, index in indices.items()}
        return reference.dydila_attention(**t, indices=at, num_heads=shape.heads)  # type: ignore[arg-type]

    exact = cast({name: t.cpu() for name, t in inputs.items()}, torch.float64)  # not every device has float64
    truth = output_and_gradients(equations, exact, wanted)
    found, plain = (output_and_gradients(function, inputs, wanted) for function in (ours, equations))
    ratios = error_ratios(*([together(tensors, truth)] for tensors in (found, plain, truth)))
    return max(ratios.values())


def together(tensors: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output, and all gradients in one vector, each in units of the norm of the true one."""
    sizes = {name: t.norm().item() or 1.0 for name, t in truth.items()}
    gradients = [t.cpu().double().flatten() / sizes[name] for name, t in tensors.items() if name != "output"]
    return {"output": tensors["output"], "gradients": torch.cat(gradients)}


@cache
def rival_error_ratio(case: Case) -> float:
    """The error of a rival's output over that of its own formula in the same dtype."""
    tokens, formula = list(random_inputs(case.shape, case.device).values())[:3], rivals.RIVALS[case.name].formula
    found, plain = (f(*tokens, heads=case.shape.heads) for f in (function_of(case.name), formula))
    return suite.error_ratio(found, plain, formula(*(t.cpu().double() for t in tokens), heads=case.shape.heads))


if __name__ == "__main__":
    suite.command(main, Config)
