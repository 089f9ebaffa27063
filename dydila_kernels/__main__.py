"""``python -m dydila_kernels``: versions, device, the backend that would run and why, and a self-check."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

import torch

from dydila_kernels import DyDiLAttention, __version__
from dydila_kernels.functional import choose_backend, why_not_triton
from dydila_kernels.testing import layer_error_ratio


def default_device() -> torch.device:
    """The accelerator that torch would use, or the CPU."""
    return (
        torch.accelerator.current_accelerator() or torch.device("cpu")
        if torch.accelerator.is_available()
        else torch.device("cpu")
    )


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def main() -> int:
    """Prints the report; returns the exit status, 1 where the self-check fails."""
    device = default_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"dydila_kernels  {__version__}")
    for package in ("torch", "einops", "numpy", "triton"):
        print(f"{package:14}  {torch.__version__ if package == 'torch' else version_of(package)}")
    print(f"{'python':14}  {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"{'device':14}  {device} ({name})")

    dtype = torch.float32
    print(f"{'backend':14}  {choose_backend('auto', device, dtype)}")
    reason = why_not_triton(device, dtype)
    if reason is not None:
        print(f"{'':14}  not triton: {reason}")

    print(f"{'self-check':14}  {DyDiLAttention(64, 2).extra_repr()}")
    failed = False
    for dtype in (torch.float32, torch.bfloat16):
        ratio = layer_error_ratio(DyDiLAttention(64, 2, device=device, dtype=dtype))
        passed = ratio <= 2
        failed |= not passed
        print(
            f"{'':14}  {'ok' if passed else 'FAILED'}: the error of {str(dtype).removeprefix('torch.')} output and gradients "
            f"against float64 is {ratio:.2f} times that of plain PyTorch (at most 2)"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
