"""``python -m dydila_kernels``: versions, device, the backend that would run and why, how sizes run; a self-check."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib import metadata

import torch

from dydila_kernels import DyDiLAttention, __version__
from dydila_kernels.functional import OLDEST_TRITON, TRITON, choose_backend, why_not_triton
from dydila_kernels.testing import layer_error_ratio


def default_device() -> torch.device:
    """The accelerator that torch would use, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def sizes(arguments: argparse.Namespace) -> list[tuple[int, int]]:
    """d and H asked for, or some that are common."""
    if arguments.dim is None:
        return [(384, 1), (384, 6), (1152, 16)]
    if arguments.dim < 1 or arguments.heads < 1 or arguments.dim % arguments.heads:
        sys.exit(f"--heads must divide --dim; got --dim {arguments.dim} --heads {arguments.heads}")
    return [(arguments.dim, arguments.heads)]


def main() -> int:
    """Prints the report; returns the exit status, 1 where the self-check fails."""
    parser = argparse.ArgumentParser("python -m dydila_kernels", description="Versions, backend, sizes, self-check.")
    parser.add_argument("--dim", type=int, help="d, to say how the kernels run it")
    parser.add_argument("--heads", type=int, default=1, help="H, with --dim (default 1)")
    asked = sizes(parser.parse_args())
    device = default_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"dydila_kernels  {__version__}")
    for package in ("torch", "einops", "triton"):
        print(f"{package:14}  {torch.__version__ if package == 'torch' else version_of(package)}")
    print(f"{'python':14}  {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"{'device':14}  {device} ({name})")

    dtype = torch.float32
    print(f"{'backend':14}  {choose_backend('auto', device, dtype)}")
    reason = why_not_triton(device, dtype)
    if reason is not None:
        print(f"{'':14}  not triton: {reason}")

    if TRITON is not None and TRITON >= OLDEST_TRITON:
        from dydila_kernels.ops.core import describe

        for dim, heads in asked:
            print(f"{'kernels':14}  d = {dim}, H = {heads}: {describe(dim, heads, torch.bfloat16)}")

    print(f"{'self-check':14}  {DyDiLAttention(64, 2).extra_repr()}")
    ratios = {d: layer_error_ratio(DyDiLAttention(64, 2, device=device, dtype=d)) for d in (dtype, torch.bfloat16)}
    for dtype, ratio in ratios.items():
        verdict = "ok" if ratio <= 2 else "FAILED"
        print(
            f"{'':14}  {verdict}: error in {str(dtype).removeprefix('torch.')} {ratio:.2f} times that of plain PyTorch"
        )
    print(f"{'':14}  (output and gradients against float64; at most 2 times is right)")
    return int(not all(ratio <= 2 for ratio in ratios.values()))


if __name__ == "__main__":
    sys.exit(main())
