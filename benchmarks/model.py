"""One step of DyDi-LiT, Sana and DiT for images of 256 to 4096 pixels a side: ``python -m benchmarks.model``.

"forward" is a denoising step, "forward+backward" a training step without its optimizer: the gradients of all trainable
parameters.  The models are those of ``examples/dydi_lit`` with random weights, at latents of an eighth of the image's
side, in patches of 2 x 2: an image of P pixels a side has (P/16)^2 tokens.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from torch import nn

from benchmarks import roofline, suite
from benchmarks.harness import Call, Row
from benchmarks.roofline import Cost
from benchmarks.suite import Comparison, Contender, Mode
from dydila_kernels.functional import why_not_triton
from dydila_kernels.testing import layer_error_ratio
from examples.dydi_lit import configs, flops
from examples.dydi_lit.model import DiffusionTransformer

PIXELS_PER_TOKEN = 16  # along a side: 8 of a latent times 2 of a patch
IMAGES = (256, 512, 1024, 2048, 4096)

Name = Literal["dydi-lit", "sana", "dit"]


@dataclass(frozen=True)
class ModelOptions(suite.Options):
    """What the suites of whole models can be told."""

    sizes: Annotated[tuple[int, ...], tyro.conf.arg(name="images", aliases=("--sizes",))] = ()
    """Sides of the images in pixels, multiples of 16; by default short ones on a CPU, and 256 to 4096 on a GPU."""
    models: tuple[Name, ...] = ("dydi-lit", "sana", "dit")  # Which models of the example.
    size: Literal["tiny", "S", "B", "L"] = "S"  # "tiny" is no size of the paper, and what --smoke takes.

    def images(self, on_cpu: int) -> list[int]:
        """In rising order, on a CPU so many; ValueError where one does not divide into patches of latents."""
        images = sorted(self.lengths(cpu=IMAGES[:on_cpu], gpu=IMAGES))
        if wrong := [image for image in images if image < PIXELS_PER_TOKEN or image % PIXELS_PER_TOKEN]:
            raise ValueError(f"images must be multiples of {PIXELS_PER_TOKEN} pixels a side; got {wrong[0]}")
        return images

    def cases(self, mode: Mode, batch: int, image: int, fused: bool = False) -> list["Case"]:
        """Of all models, who meet the same input; ours in its inference form where ``fused``."""
        each = Case("", "tiny" if self.smoke else self.size, mode, batch, image, self.device, self.torch_dtype)
        return [each._replace(name=name, fused=fused and name == "dydi-lit") for name in self.models]


@dataclass(frozen=True)
class Config(ModelOptions):
    """Time and memory of a denoising step and a training step of DyDi-LiT, Sana and DiT."""

    modes: tuple[Mode, ...] = ("forward", "forward+backward")  # A denoising step, and a training step.
    batch_size: Annotated[int, tyro.conf.arg(name="batch")] = 0
    """Images at once; by default 1 on a CPU, and on a GPU as many as make 32,768 tokens, at least 1."""


class Case(NamedTuple):
    """A model and what it meets."""

    name: str
    size: str
    mode: Mode
    batch: int
    image: int
    device: str
    dtype: torch.dtype
    fused: bool = False

    @property
    def tokens(self) -> int:
        return (self.image // PIXELS_PER_TOKEN) ** 2

    @property
    def config(self) -> Any:
        return configs.config_of(self.name, self.size)  # type: ignore[arg-type]

    @property
    def labels(self) -> Row:
        settings = {"heads": self.config.num_heads, "size": self.size, "dim": self.config.dim}
        where = {"image": self.image, "tokens": self.tokens, "batch": self.batch}
        return {"name": self.name, "mode": self.mode, **settings, **where}


def comparisons(config: Config) -> Iterator[Comparison]:
    """By mode, each in rising order of size."""
    for mode, image in product(config.modes, config.images(on_cpu=3)):
        batch = config.batch_size or config.batch((image // PIXELS_PER_TOKEN) ** 2, 32768)
        yield [contender(case) for case in config.cases(mode, batch, image)]


def contender(case: Case) -> Contender:
    return Contender(
        partial(prepare, case),
        case.labels,
        cost(case),
        partial(error_ratio, case) if case.name == "dydi-lit" else None,
        warm_up=partial(prepare, case._replace(batch=1, image=2 * PIXELS_PER_TOKEN)),
    )


def error_ratio(case: Case) -> float:
    """Of the attention layer of the first block, for its output and all gradients."""
    model = network(case.name, case.size, True, False, case.device, case.dtype)
    return layer_error_ratio(model.blocks[0].attention, length=min(case.tokens, suite.CHECKED_TOKENS))


def prepare(case: Case) -> Call:
    """The step to time, on inputs of its own; the weights are the same for all steps, as they are in use."""
    model = network(case.name, case.size, case.mode != "forward", case.fused, case.device, case.dtype)
    side = case.image // 8
    latent = torch.randn(case.batch, 4, side, side, device=case.device, dtype=case.dtype)
    incoming = torch.randn(case.batch, model.out_channels, side, side).to(latent)
    step = torch.full((case.batch,), 500, device=case.device)
    label = torch.arange(case.batch, device=case.device) % 1000
    label[-1] = 1000  # the null class, as in guidance
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return suite.call_of(case.mode, partial(model, latent, step, label), trainable, incoming)


@functools.cache
def network(name: str, size: str, training: bool, fused: bool, device: str, dtype: torch.dtype) -> Any:
    """A DiffusionTransformer with random weights."""
    torch.manual_seed(0)
    model = DiffusionTransformer(configs.config_of(name, size))  # type: ignore[arg-type]
    for parameter in model.parameters():
        if not parameter.any():  # a GPU multiplies zeros faster than its power allows for real numbers
            nn.init.normal_(parameter, std=0.02)
    model.to(device=device, dtype=dtype).train(training)
    return model.fuse() if fused else model


def cost(case: Case) -> Cost | None:
    """Weights and latents, read and written once in each direction, and all matrix products; None without Triton."""
    if why_not_triton(torch.device("meta"), torch.float32):
        return None
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in DiffusionTransformer(case.config).parameters())
    products = 2e9 * flops.gflops(case.config, case.image)[1]  # a multiplication and its addition counted as one
    latents = 3 * case.batch * 4 * (case.image // 8) ** 2  # in, and out twice as wide
    forward = Cost((weights + latents) * case.dtype.itemsize, products * case.batch)
    return roofline.by_mode(case.mode, forward, forward * 2)


main = partial(suite.run, "model", comparisons)

if __name__ == "__main__":
    suite.command(main, Config)
