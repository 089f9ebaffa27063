"""Swapping the attention of existing models: the public function, the layers it puts in place, what it recognises."""

from dydila_kernels.convert.layers import DiffusersAttention, VisionAttention
from dydila_kernels.convert.replace import Kept, ReplacementReport, Swapped, replace_attention

__all__ = ["DiffusersAttention", "Kept", "ReplacementReport", "Swapped", "VisionAttention", "replace_attention"]
