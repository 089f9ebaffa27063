"""Cost of one denoising step against image resolution, the paper's Fig. 1(a): python -m examples.dydi_lit.cost

DiT, Sana and DyDi-LiT of one size, a forward pass of one image in inference form: latency, memory and GFLOPs, as rows
of JSON, and a picture drawn from them. Latencies are measured in turn, so that a drift of the machine meets all three.
Before DyDi-LiT is timed, its attention is checked against the equations.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.harness import (
    CheckFailed,
    Row,
    clock,
    environment,
    in_fresh_process,
    interleave,
    peak_growth_mib,
    read_rows,
    require_correct,
    summarize,
    write_rows,
)
from dydila_kernels import DyDiLAttention
from dydila_kernels.functional import why_not_triton
from dydila_kernels.testing import layer_error_ratio
from examples.dydi_lit.configs import TITLES, Model, Size, config_of
from examples.dydi_lit.flops import PIXELS_PER_LATENT, gflops
from examples.dydi_lit.model import DiffusionTransformer, attention_of
from examples.dydi_lit.plots import DPI, save

MODELS: tuple[Model, ...] = ("dit", "sana", "dydi-lit")
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class CostConfig:
    """Measure a denoising step of DiT, Sana and DyDi-LiT at several resolutions, and draw it."""

    output: Path = Path("runs/cost.jsonl")
    """File of the rows; the picture is written beside it, as .png."""
    size: Size = "S"
    """Size of the models."""
    resolutions: tuple[int, ...] = ()
    """Height and width of the images in pixels, eight to a latent; unless given, 256 to 1024 on a CPU, else to 4096."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to measure."""
    dtype: Dtype | None = None
    """Of weights and latents; unless given, float32 on a CPU and else bfloat16."""
    repeats: int = 20
    """Timed passes of each model at each resolution, at most."""
    seconds: float = 4.0
    """Time for each model at each resolution; what takes longer is timed once."""
    measure: bool = True
    """Whether to measure; else the picture is drawn from the rows that are there."""

    def __post_init__(self) -> None:
        patch = config_of("dit", self.size).patch_size * PIXELS_PER_LATENT
        for resolution in self.resolutions:
            if resolution < patch or resolution % patch:
                raise ValueError(f"resolutions must be multiples of {patch}; got {resolution}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1; got {self.repeats}")
        try:
            torch.empty(0, device=self.device)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"device {self.device!r} cannot be used: {str(error).splitlines()[0]}") from None


def rows(config: CostConfig) -> Iterator[Row]:
    """Measures and yields one row for each resolution and model, in that order.

    A model that does not fit into the memory of the device has null for latency and memory. Raises CheckFailed,
    before anything is timed, where DyDi-LiT's attention is wrong.
    """
    on_cpu = torch.device(config.device).type == "cpu"
    dtype: Dtype = config.dtype or ("float32" if on_cpu else "bfloat16")
    attention = attention_of(config_of("dydi-lit", config.size), block=0)
    assert isinstance(attention, DyDiLAttention)
    require_correct(layer_error_ratio(attention.to(config.device, getattr(torch, dtype))))

    counting = why_not_triton(torch.device("meta"), torch.float32) is None
    facts = {**environment(config.device), "dtype": dtype, "size": config.size, "batch": 1}
    for resolution in tqdm(config.resolutions or ((256, 512, 1024) if on_cpu else (256, 512, 1024, 2048, 4096))):
        arguments = {model: (model, config.size, resolution, config.device, dtype) for model in MODELS}
        memory: dict[Model, float | None] = {}
        for model in MODELS:
            memory[model] = in_fresh_process(peak_mib, *arguments[model]) if on_cpu else peak_mib(*arguments[model])
        fits = [model for model in MODELS if on_cpu or memory[model] is not None]
        clocks = {model: clock(step_of(*arguments[model]), config.device) for model in fits}
        seconds = interleave(clocks, repeats=config.repeats, budget_seconds=config.seconds)
        for model in MODELS:
            settings = config_of(model, config.size)
            counted, true = gflops(settings, resolution) if counting else (None, None)
            tokens = (resolution // PIXELS_PER_LATENT // settings.patch_size) ** 2
            taken = summarize(seconds[model]) if model in seconds else {"median_ms": None}
            measured = {**taken, "peak_mib": memory[model], "gflops": counted, "gflops_true": true}
            yield {"model": model, "resolution": resolution, "tokens": tokens, **measured, **facts}


def step_of(model: Model, size: Size, resolution: int, device: str, dtype: Dtype) -> Callable[[], torch.Tensor]:
    """One denoising step as a call: a forward pass of one latent, without gradients, in inference form."""
    config = config_of(model, size)
    network = DiffusionTransformer(config).eval().fuse().to(device, getattr(torch, dtype))
    side = resolution // PIXELS_PER_LATENT
    latent = torch.randn(1, config.in_channels, side, side, device=device, dtype=getattr(torch, dtype))
    timestep, label = torch.tensor([500], device=device), torch.tensor([0], device=device)

    def step() -> torch.Tensor:
        with torch.inference_mode():
            return network(latent, timestep, label)

    return step


def peak_mib(model: Model, size: Size, resolution: int, device: str, dtype: Dtype) -> float | None:
    """MiB that a step takes beside the weights; None where it cannot be told, or does not fit."""
    small, step = (step_of(model, size, pixels, device, dtype) for pixels in (64, resolution))
    small()  # what a first pass alone allocates
    try:
        return peak_growth_mib(step, device)
    except torch.OutOfMemoryError:
        return None


def draw(measured: list[Row], path: Path) -> None:
    """Draws latency, memory and GFLOPs against resolution, from rows of one run; a panel without any is left out."""
    labels = {"median_ms": "latency of a step [ms]", "peak_mib": "memory beside weights [MiB]", "gflops": "GFLOPs"}
    names = [name for name in labels if any(row[name] for row in measured)]
    resolutions = sorted({row["resolution"] for row in measured})
    figure = Figure(figsize=(3.7 * len(names), 3.6), dpi=DPI, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for number, model in enumerate(MODELS):
            present = [row for row in measured if row["model"] == model and row[name]]
            pixels = [row["resolution"] for row in present]
            axes.plot(pixels, [row[name] for row in present], color=f"C{number}", marker="o", label=TITLES[model])
            if name == "median_ms":
                low, high = ([row[quantile] for row in present] for quantile in ("q10_ms", "q90_ms"))
                axes.fill_between(pixels, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(resolutions, resolutions)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "25" else "")
        axes.set(xlabel="image height = width [pixels]", title=labels[name])
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].legend()
    facts = measured[0]
    machine = f"{facts['device']}, {facts['dtype']}, threads: {facts['threads']}, torch {facts['torch']}"
    figure.suptitle(f"One denoising step, size {facts['size']}, batch 1\n{machine}", fontsize=10)
    save(figure, path)


def main() -> None:
    try:
        config = tyro.cli(CostConfig, prog="python -m examples.dydi_lit.cost")
        measured: list[Row] = []
        if config.measure:
            for row in rows(config):
                measured.append(row)
                write_rows(config.output, measured)
                tqdm.write(line_of(row))
        else:
            measured = read_rows(config.output)
    except (ValueError, CheckFailed, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    draw(measured, config.output.with_suffix(".png"))
    print(f"wrote {config.output} and {config.output.with_suffix('.png')}")


def line_of(row: Row) -> str:
    """A row for people; a dash stands for what could not be measured."""
    units = {"median_ms": "ms", "peak_mib": "MiB", "gflops": "GFLOPs"}
    numbers = (
        f"{row[name]:10.1f} {unit}" if row[name] is not None else f"{'-':>10} {unit}" for name, unit in units.items()
    )
    return f"{row['resolution']:5} {TITLES[row['model']]:9}" + "".join(numbers)


if __name__ == "__main__":
    main()
