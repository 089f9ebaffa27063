"""The attention core, given its tokens, against softmax and linear attention: ``python -m benchmarks.core``.

Ours takes q, k, v, q', k' (B, N, d); "dydila eager" and "dydila compiled" are the equations of
:mod:`dydila_kernels.reference` in the dtype of the tokens, without and with ``torch.compile``.  The rivals take q, k
and v.  Gradients are those of the tokens, and for ours of the tables gamma and lambda.  Heads of more than 256 channels
are left to linear attention: fused softmax has none so wide.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product

import torch
from torch import Tensor

from benchmarks import rivals, roofline, suite
from benchmarks.harness import Call
from benchmarks.roofline import Shape
from benchmarks.suite import Case, Comparison, Contender
from dydila_kernels import dydila_attention, reference, testing
from dydila_kernels.testing import TOKENS, core_inputs, decisions

OURS: dict[str, rivals.Attention] = {"dydila": dydila_attention}
OURS |= dict.fromkeys(("dydila eager", "dydila compiled"), reference.dydila_attention)
FACTORS = 9  # entries of gamma and of lambda, as in the layer by default


@dataclass(frozen=True)
class Config(suite.Options):
    """The attention core, given its tokens, against softmax and linear attention."""

    dim: int = 384  # Channels d.
    heads: tuple[int, ...] = ()  # Heads to measure with; by default 1 and DIM/64.
    compiled: bool = torch.cuda.is_available()
    """Measure under torch.compile too; by default where there is a GPU.  Each size is compiled anew, which takes long
    and, on a CPU, a C++ compiler."""


def comparisons(config: Config) -> Iterator[Comparison]:
    heads = suite.heads_of(config.heads, config.dim)
    who = [(name, h) for h in heads for name in names(config, config.dim // h)]
    sizes = config.lengths(cpu=(256, 1024, 4096, 16384), gpu=(256, 1024, 4096, 16384, 65536))
    for tokens, mode in product(sizes, config.modes):
        yield [contender(case) for case in suite.cases(config, mode, tokens, config.dim, who)]


def names(config: Config, head_dim: int) -> list[str]:
    """Who is measured with heads of this width; 256 channels are the most that fused softmax takes."""
    everyone = [*OURS, *(rivals.RIVALS if head_dim <= 256 else rivals.ANY_WIDTH)]
    return [name for name in everyone if config.compiled or not name.endswith("compiled")]


def contender(case: Case) -> Contender:
    name, mode, shape, device, _ = case
    labels, missing, check = case.labels, None, error_ratio if name == "dydila" else None
    if (rival := rivals.RIVALS.get(name)) is not None:
        labels |= {"computes": rival.computes} if rival.computes else {}
        missing, check = rivals.missing(name, shape, device), rival_error_ratio if rival.formula else None
    cost = (rival.cost if rival else roofline.core)(shape, mode)
    checked, small = check and partial(check, case.checked), suite.warm_up(prepare, case)
    return Contender(partial(prepare, case), labels, cost, checked, missing, small, graph=True)


def prepare(case: Case) -> Call:
    """What is timed, on random inputs of its own."""
    name, mode, shape, device, _ = case
    inputs = random_inputs(shape, device)
    tokens = [inputs.pop(key) for key in TOKENS][: 5 if name in OURS else 3]
    function = OURS[name] if name in OURS else rivals.RIVALS[name].attend
    function = compiled(function) if name.endswith("compiled") else function
    if name in OURS:
        attend, leaves = partial(function, num_heads=shape.heads, **inputs), [*tokens, inputs["gamma"], inputs["lam"]]
    else:
        attend, leaves = partial(function, heads=shape.heads), tokens
    # The queries double as the gradient that comes in, which saves their memory.
    call = suite.call_of(mode, lambda: attend(*tokens), leaves, tokens[0].detach())
    if name.endswith("compiled"):
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


@cache
def compiled(function: rivals.Attention) -> rivals.Attention:
    """Once: torch would compile another object of the same function again."""
    return torch.compile(function, dynamic=False, fullgraph=True)


@cache
def error_ratio(case: Case) -> float:
    """Our error over that of the equations in plain PyTorch in the same dtype and with the same decisions."""
    shape = case.shape
    inputs = core_inputs(
        shape.batch, shape.tokens, shape.dim, num_kernel_factors=FACTORS, num_differential_factors=FACTORS,
        dtype=shape.dtype, device=case.device,
    )  # fmt: skip
    indices = decisions(inputs, num_heads=shape.heads)

    def ours(t: dict[str, Tensor]) -> Tensor:
        return dydila_attention(**t, num_heads=shape.heads)  # type: ignore[arg-type]

    def equations(t: dict[str, Tensor]) -> Tensor:
        at = {name: index.to(t["q"].device) for name, index in indices.items()}
        return reference.dydila_attention(**t, indices=at, num_heads=shape.heads)  # type: ignore[arg-type]

    return testing.error_ratio(ours, equations, inputs, [name for name in inputs if "routers" not in name])


@cache
def rival_error_ratio(case: Case) -> float:
    """The error of a rival's output over that of its own formula in the same dtype."""
    rival, inputs = rivals.RIVALS[case.name], random_inputs(case.shape, case.device)
    ours, formula = (lambda t, f=f: f(**t, heads=case.shape.heads) for f in (rival.attend, rival.formula))
    return testing.error_ratio(ours, formula, {name: inputs[name] for name in "qkv"}, ())


main = partial(suite.run, "core", comparisons)

if __name__ == "__main__":
    suite.command(main, Config)
