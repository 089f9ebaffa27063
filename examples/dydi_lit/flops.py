"""FLOPs of the models of the paper, beside the figures that it prints: python -m examples.dydi_lit.flops

Each model runs once, on one image and on the meta device, which knows shapes and no numbers, while torch's
FlopCounterMode listens. A multiplication whose result is added up is one FLOP, as in the paper, though two for torch.

    counted     as the paper counts: without the projections of Q' and K' and without routers, and with a convolution
                for each branch of Eq. 9, 3x3 + 1x3 + 3x1 = 15 taps, as trained; of DiG without the recurrence and the
                last projection of SwiGLU, which the authors' code leaves to fused functions that no counter of modules
                hears
    true        what is multiplied: all these too, and the 9 taps that the branches are added up to; of DiG in chunks of
                16 tokens

Both take the two products of linear attention in the cheaper order, and neither counts element-wise work.
"""

import csv
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from dydila_kernels import DyDiLAttention
from dydila_kernels.depthwise import SIZES
from dydila_kernels.functional import why_not_triton
from examples.dydi_lit.configs import Model, ModelConfig, Size, config_of
from examples.dydi_lit.dig import Recurrence, SwiGLU
from examples.dydi_lit.model import DiffusionTransformer

PAPER = Path(__file__).with_name("gflops.csv")
"""The columns GFLOPs of Tables 1, 2 and 5 of arXiv 2601.13683, for images of `resolution` pixels a side."""
FAMILIES: dict[str, Model] = {
    "DiT": "dit", "DiG": "dig", "PixArt-Sigma": "pixart-sigma", "EDiT": "edit", "Sana": "sana", "DyDi-LiT": "dydi-lit"
}  # fmt: skip
PIXELS_PER_LATENT = 8
FLOPS_PER_GFLOP = 2e9
"""Of torch's FLOPs, which are two for a multiplication and its addition, in a GFLOP of the paper's, which are one."""


class Row(NamedTuple):
    """One figure of the paper; the last three are GFLOPs of one forward pass of one image."""

    table: int
    resolution: int
    model: str
    paper: float
    counted: float
    true: float


@dataclass(frozen=True)
class FlopsConfig:
    """Count the FLOPs of the paper's models and compare them with the paper's figures. Takes seconds, and no GPU."""

    csv: bool = False
    """Print comma-separated values instead of a table."""


def rows() -> Iterator[Row]:
    """The figures of the paper in their order, each counted when it is asked for."""
    with PAPER.open(newline="") as file:
        for figure in csv.DictReader(file):
            resolution = int(figure["resolution"])
            counted, true = gflops(config_named(figure["model"]), resolution)
            yield Row(int(figure["table"]), resolution, figure["model"], float(figure["gflops"]), counted, true)


def config_named(model: str) -> ModelConfig:
    """The configuration of a model by its name in PAPER, such as "DyDi-LiT-S" or "DyDi-LiT-S map-wise".

    The map-wise model has the convolution here, too: the token-wise one beside it in Table 5 has 5.98 GFLOPs, and has
    them with the convolution alone, though its FID is the one of Table 4 without. (Counted once for each of the two
    maps, the convolution would make the 6.45 of the paper, too.)
    """
    name, _, form = model.partition(" ")
    family, _, size = name.rpartition("-")
    config = config_of(FAMILIES[family], cast(Size, size))
    return replace(config, differential="map") if form == "map-wise" else config


def gflops(config: ModelConfig, resolution: int) -> tuple[float, float]:
    """(counted, true) of one forward pass of one image of `resolution` pixels a side; see the top of this file.

    Raises ModuleNotFoundError where Triton is not installed, which the operators that are counted need.
    """
    with torch.device("meta"):
        model = DiffusionTransformer(config)
        latent = torch.empty(1, config.in_channels, *(resolution // PIXELS_PER_LATENT,) * 2)
        timestep, label = torch.empty(1), torch.empty(1, dtype=torch.int64)
    for module in model.modules():
        if isinstance(module, DyDiLAttention):
            module.backend = "triton"
    counted, true = FlopCounterMode(custom_mapping=as_the_paper(config), display=False), FlopCounterMode(display=False)
    with torch.no_grad(), counted, true:
        model(latent, timestep, label)
    by_module = counted.get_flop_counts()
    unheard = sum(sum(by_module[f"{type(model).__name__}.{name}"].values()) for name in unheard_modules(model))
    return (counted.get_total_flops() - unheard) / FLOPS_PER_GFLOP, true.get_total_flops() / FLOPS_PER_GFLOP


def unheard_modules(model: DiffusionTransformer) -> list[str]:
    """The names of the modules that stand for parts of fused functions in the authors' code; see above."""
    modules = dict(model.named_modules())
    recurrences = [name for name, module in modules.items() if isinstance(module, Recurrence)]
    return recurrences + [f"{name}.reduce" for name, module in modules.items() if isinstance(module, SwiGLU)]


def as_the_paper(config: ModelConfig) -> dict[Any, Callable[..., int]]:
    """How the paper counts our operators, for FlopCounterMode."""
    from dydila_kernels.ops import operators as registered

    taps = sum(prod(SIZES[branch]) for branch in config.dwc_branches if branch != "identity")

    def attention(*arguments: Any, **_: Any) -> int:
        work = registered.flops.work_of(*arguments)
        return 2 * (2 * work.products * work.product + taps * work.tap)

    def nothing(*_arguments: Any, **_: Any) -> int:
        return 0

    operators = torch.ops.dydila_kernels
    return {operators.attention: attention, operators.route: nothing, operators.projection: nothing}


def print_table(figures: Iterable[Row]) -> None:
    """Prints each row as it comes, with the difference of `counted` from `paper` in percent."""
    line = "{:>5}{:>12}  {:<22}{:>8}{:>10}{:>12}{:>10}".format
    print(line("Table", "resolution", "model", "paper", "counted", "difference", "true"))
    for row in figures:
        numbers = f"{row.paper:.2f}", f"{row.counted:.3f}", f"{row.counted / row.paper - 1:+.2%}", f"{row.true:.3f}"
        print(line(row.table, row.resolution, row.model, *numbers))
    print("GFLOPs of one forward pass of one image; a multiplication and its addition are one FLOP, as in the paper.")
    print("counted: as the paper counts, without the projections of Q' and K' and without routers, with 15 taps of the")
    print(
        "convolution, and of DiG without the recurrence and the last projection of SwiGLU. true: all this, and 9 taps."
    )


def print_csv(figures: Iterable[Row]) -> None:
    """Prints a header, and each row as it comes."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows((*row[:3], f"{row.paper:.2f}", f"{row.counted:.4f}", f"{row.true:.4f}") for row in figures)


def main() -> None:
    config = tyro.cli(FlopsConfig, prog="python -m examples.dydi_lit.flops")
    if reason := why_not_triton(torch.device("meta"), torch.float32):
        raise SystemExit(f"error: {reason}; what is counted are the operators that need it")
    (print_csv if config.csv else print_table)(rows())


if __name__ == "__main__":
    main()
