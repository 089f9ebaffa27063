"""Swapping the attention of existing models: the public functions, the layers they put in place, what they report."""

from dydila_kernels.convert.layers import DiffusersAttention, LightningAttention, SanaAttention, VisionAttention
from dydila_kernels.convert.replace import repeat_replacement, replace_attention
from dydila_kernels.convert.report import Kept, ReplacementReport, Swapped

__all__ = [
    "DiffusersAttention",
    "Kept",
    "LightningAttention",
    "ReplacementReport",
    "SanaAttention",
    "Swapped",
    "VisionAttention",
    "repeat_replacement",
    "replace_attention",
]
