"""The models of the paper's tables by name: which attention, which feed-forward, and how large."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

Model = Literal[
    "dit",
    "sana",
    "focused-kernel",
    "dynamic-measure-kernel",
    "dynamic-projection",
    "token-differential",
    "dydi-lit",
    "map-differential",
    "increasing-lambda",
    "token-differential-denominator",
    "pixart-sigma",
    "edit",
    "dig",
    "lit",
    "moh-dit",
]
Size = Literal["toy", "tiny", "S", "B", "L"]

LADDER: tuple[Model, ...] = (
    "sana",
    "focused-kernel",
    "dynamic-measure-kernel",
    "dynamic-projection",
    "token-differential",
    "dydi-lit",
)
"""The rows of Table 4, each with one component more than the one before."""

TITLES: dict[Model, str] = {
    "dit": "DiT",
    "sana": "Sana",
    "focused-kernel": "+ focused kernel",
    "dynamic-measure-kernel": "+ dynamic measure kernel",
    "dynamic-projection": "+ dynamic projection module",
    "token-differential": "+ token differential operator",
    "dydi-lit": "DyDi-LiT",
    "map-differential": "attention map-wise paradigm",
    "increasing-lambda": "increasing initialization",
    "token-differential-denominator": "token differential operator, with a denominator",
    "pixart-sigma": "PixArt-Σ",
    "edit": "EDiT",
    "dig": "DiG",
    "lit": "LiT",
    "moh-dit": "MoH-DiT",
}
"""What the paper's tables call them, and a control of ours; "dydi-lit" is Table 4's "+ reparameterization"."""


@dataclass(frozen=True)
class ModelConfig:
    """What fixes a network; the image size does not, because the network follows the grid it is given."""

    dim: int
    """d, channels of a token."""
    depth: int
    """Blocks."""
    num_heads: int = 1
    attention: Literal[
        "softmax", "compressed", "mixture-of-heads", "relu", "convolved", "linear-compressed", "gated", "dydila"
    ] = "dydila"
    """Softmax as in DiT, PixArt-Sigma's or MoH-DiT's; linear as in Sana (ReLU, Eq. 4), LiT, EDiT or DiG; or DyDiLA."""
    feed_forward: Literal["mlp", "glumbconv", "swiglu"] = "glumbconv"
    ffn_ratio: float = 4.0
    """Hidden channels of the feed-forward over d."""
    block_convolution: bool = False
    """A depth-wise convolution after each block, as in DiG."""
    compression: int = 4
    """R of PixArt-Sigma: keys and values are those of R x R tokens ..."""
    compressed_blocks: int = 0
    """... in this many of the last blocks."""
    shared_heads: int = 1
    """Heads of MoH-DiT that all tokens have, and how many more each token takes."""
    taken_heads: int = 1

    num_projectors: int = 3
    """n_P of Eq. 2; 0 leaves the dynamic projection out."""
    num_kernel_factors: int = 9
    """n_F of Eq. 6."""
    num_differential_factors: int = 9
    """n_D of Eq. 7."""
    learned_gamma: bool = True
    """False keeps the kernel factor at its initial 3, as the focused kernel does."""
    lambda_init: tuple[float, float] = (0.01, 0.01)
    """Initial differential factor of the first and the last block; linear in between."""
    differential: Literal["token", "map", "off"] = "token"
    normalization: Literal["none", "length", "denominator"] = "length"
    dwc_branches: tuple[str, ...] = ("3x3", "1x3", "3x1")
    router_gradient: Literal["none", "straight_through"] = "none"

    patch_size: int = 2
    in_channels: int = 4
    """Channels of the image or latent."""
    num_classes: int = 1000
    initialization: Literal["dit", "pytorch"] = "dit"
    """Weights of linear layers and embeddings: DiT's, or PyTorch's own, with which short runs learn faster."""
    learn_sigma: bool = True
    """Whether the network predicts a variance beside the noise, as in DiT; it then returns 2 in_channels."""

    def __post_init__(self) -> None:
        for name in ("lambda_init", "dwc_branches"):  # JSON has lists only
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.lambda_init) != 2:
            raise ValueError(f"lambda_init must be two numbers, for the first and last block; got {self.lambda_init}")
        check_types(self)
        if self.dim < 4 or self.dim % 4:
            raise ValueError(f"dim must be a multiple of 4, for sines and cosines of two axes; got {self.dim}")
        if self.ffn_ratio <= 0:
            raise ValueError(f"ffn_ratio must be positive; got {self.ffn_ratio}")
        for name in ("depth", "patch_size", "in_channels", "num_classes", "compression"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")

    def lambda_of(self, block: int) -> float:
        """The initial differential factor of block number `block`, from 0."""
        first, last = self.lambda_init
        return first + (last - first) * (block / max(self.depth - 1, 1))


_SIZES: dict[Size, dict[str, Any]] = {  # "toy" and "tiny" are ours, for digits on a CPU
    "toy": {"dim": 64, "depth": 3, "ffn_ratio": 1.5, "patch_size": 1, "initialization": "pytorch"},
    "tiny": {"dim": 128, "depth": 4, "ffn_ratio": 2.0, "initialization": "pytorch"},
    "S": {"dim": 384, "depth": 9},
    "B": {"dim": 512, "depth": 9, "num_projectors": 5, "num_kernel_factors": 15, "num_differential_factors": 15},
    "L": {"dim": 768, "depth": 9, "num_projectors": 7, "num_kernel_factors": 21, "num_differential_factors": 21},
}
_DIT_DEPTH = {"toy": 4, "tiny": 5, "S": 12, "B": 12, "L": 12}  # DiT's blocks cost less; the paper evens FLOPs
_DIG_DEPTH = {"toy": 4, "tiny": 4, "S": 15, "B": 14, "L": 15}  # four scans; the others give the paper's GFLOPs

# Eq. 4 has a denominator and Eq. 8 has none: the rows before the token differential are Sana with another kernel.
_WITHOUT_DIFFERENCE = {"differential": "off", "normalization": "denominator", "dwc_branches": ()}
_VARIANTS: dict[Model, dict[str, Any]] = {
    "sana": {"attention": "relu"},
    "focused-kernel": {
        **_WITHOUT_DIFFERENCE, "num_projectors": 0, "num_kernel_factors": 1, "learned_gamma": False,
    },
    "dynamic-measure-kernel": {**_WITHOUT_DIFFERENCE, "num_projectors": 0},
    "dynamic-projection": _WITHOUT_DIFFERENCE,
    "token-differential": {"dwc_branches": ()},
    "dydi-lit": {},
    "map-differential": {"differential": "map", "dwc_branches": ()},
    "increasing-lambda": {"lambda_init": (0.2, 0.8), "dwc_branches": ()},
    "token-differential-denominator": {"normalization": "denominator", "dwc_branches": ()},
}  # fmt: skip


def _dit(fields: dict[str, Any], size: Size) -> dict[str, Any]:
    heads = max(fields["dim"] // 64, 1)
    return {
        "depth": _DIT_DEPTH[size], "attention": "softmax", "num_heads": heads, "feed_forward": "mlp", "ffn_ratio": 4.0
    }  # fmt: skip


def _pixart_sigma(fields: dict[str, Any], size: Size) -> dict[str, Any]:
    options = _dit(fields, size)
    small = size in ("toy", "tiny")  # whose grids are of 8 x 8 and 4 x 4 tokens
    compressed = {"compression": 2 if small else 4, "compressed_blocks": options["depth"] // 2}
    return options | {"attention": "compressed"} | compressed


def _moh_dit(fields: dict[str, Any], size: Size) -> dict[str, Any]:
    """Three of four heads in use, a third of all shared."""
    heads = max(fields["dim"] // 64, 4)
    mixture = {"num_heads": heads, "shared_heads": heads // 3, "taken_heads": math.ceil(0.75 * heads) - heads // 3}
    return _dit(fields, size) | {"attention": "mixture-of-heads"} | mixture


def _lit(fields: dict[str, Any], size: Size) -> dict[str, Any]:
    return _dit(fields, size) | {"attention": "convolved", "num_heads": 2}


def _edit(fields: dict[str, Any], size: Size) -> dict[str, Any]:
    return {"attention": "linear-compressed", "feed_forward": "mlp", "ffn_ratio": 4.0}


def _dig(fields: dict[str, Any], size: Size) -> dict[str, Any]:
    """SwiGLU's hidden channels are 8 d / 3, rounded up to a multiple of 256 as in the authors' code."""
    hidden = fields["dim"] * 8 // 3
    if size not in ("toy", "tiny"):
        hidden = 256 * math.ceil(hidden / 256)
    widths = {"num_heads": max(fields["dim"] // 64, 1), "ffn_ratio": hidden / fields["dim"]}
    options = {"depth": _DIG_DEPTH[size], "attention": "gated", "feed_forward": "swiglu", "block_convolution": True}
    return options | widths


_RIVALS: dict[Model, Callable[[dict[str, Any], Size], dict[str, Any]]] = {
    "dit": _dit,
    "moh-dit": _moh_dit,
    "pixart-sigma": _pixart_sigma,
    "dig": _dig,
    "edit": _edit,
    "lit": _lit,
}


def config_of(model: Model = "dydi-lit", size: Size = "S", **changes: Any) -> ModelConfig:
    """The configuration called `model` at `size`, with `changes` to its fields; ValueError where there is none."""
    if size not in _SIZES:
        raise ValueError(f"unknown size {size!r}: choose one of {', '.join(_SIZES)}")
    fields = dict(_SIZES[size])
    if model in _RIVALS:
        fields |= _RIVALS[model](fields, size)
    elif model in _VARIANTS:
        fields |= _VARIANTS[model]
    else:
        raise ValueError(f"unknown model {model!r}: choose one of {', '.join(TITLES)}")
    return replace(ModelConfig(**fields), **changes)


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The fields in JSON's types."""
    return asdict(config)


def from_json(fields: dict[str, Any]) -> ModelConfig:
    """The inverse of `to_json`; ValueError names what is missing or not a field."""
    try:
        return ModelConfig(**fields)
    except TypeError as error:
        raise ValueError(f"not the configuration of a model: {error}") from None


def check_types(config: Any) -> None:
    """ValueError names the field of a dataclass whose value, from JSON perhaps, is not of the type that it declares."""
    for name, kind in get_type_hints(type(config)).items():
        if not _is_of(getattr(config, name), kind):
            expected = getattr(kind, "__name__", str(kind)) if get_origin(kind) is None else str(kind)
            raise ValueError(f"{name} must be {expected.replace('typing.', '')}; got {getattr(config, name)!r}")


def _is_of(value: Any, kind: Any) -> bool:
    """Whether the value is of the type; a float is finite, and a bool is no number."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in arguments
    if origin in (Union, UnionType):
        return any(_is_of(value, argument) for argument in arguments)
    if origin in (list, tuple):
        if not isinstance(value, origin):
            return False
        kinds = arguments if origin is tuple and ... not in arguments else arguments[:1] * len(value)
        return len(value) == len(kinds) and all(map(_is_of, value, kinds))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
