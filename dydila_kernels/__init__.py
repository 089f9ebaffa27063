"""Dynamic Differential Linear Attention (arXiv 2601.13683) as a drop-in module."""

from dydila_kernels.attention import DyDiLAttention
from dydila_kernels.convert import ReplacementReport, repeat_replacement, replace_attention
from dydila_kernels.functional import dydila_attention
from dydila_kernels.routing import Routing

__version__ = "0.1.0"

__all__ = [
    "DyDiLAttention",
    "ReplacementReport",
    "Routing",
    "__version__",
    "dydila_attention",
    "repeat_replacement",
    "replace_attention",
]
