"""Which dtype computes what: shared by the layer and both backends, which choose their dtypes themselves."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, logits, powers, states and sums for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that ``nn.Linear`` would cast to on this device now, or None outside autocast."""
    # Meta tensors have no autocast.  The Dynamo of torch 2.9 and older cannot ask torch.amp.is_autocast_available.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off: the core chooses its dtypes itself."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
