"""Swapping the attention of existing models: the public function, the layers it puts in place, what it recognises."""

from dydila_kernels.convert.layers import DiffusersAttention, VisionAttention
from dydila_kernels.convert.replace import replace_attention
from dydila_kernels.convert.report import Kept, ReplacementReport, Swapped

__all__ = ["DiffusersAttention", "Kept", "ReplacementReport", "Swapped", "VisionAttention", "replace_attention"]
