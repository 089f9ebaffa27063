"""The functional core: checks of the arguments and the choice of the backend."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from dydila_kernels import checks, torch_backend
from dydila_kernels.types import DIFFERENTIAL_SIDES, Convolution, CoreInputs, Grid, Options, Ranks

OLDEST_TRITON = (3, 6)
MOST_CHOICES = 128
"""Entries of a table, or projectors, that the int8 indices of the kernels can tell apart."""


def triton_version() -> tuple[int, ...] | None:
    """Of the installed Triton, or None, without importing it."""
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            return tuple(int(part) for part in metadata.version(name).split("+")[0].split(".")[:2])
        except metadata.PackageNotFoundError:
            continue
    return None


TRITON = triton_version()
_said: set[str] = set()
"""Reasons for the torch backend that a warning has told."""


def why_not_triton(device: torch.device, dtype: torch.dtype, choices: int = 1) -> str | None:
    """Why the Triton backend cannot run on this device with this dtype and tables of so many choices; None: it can."""
    if TRITON is None:
        return "Triton is not installed (pip install dydila-kernels[triton])"
    if TRITON < OLDEST_TRITON:
        needed, found = (".".join(map(str, v)) for v in (OLDEST_TRITON, TRITON))
        return f"Triton {needed} or newer is needed; {found} is installed"
    # On the meta device the operators are called for shapes alone, and no kernel runs.
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type not in ("cuda", "meta") and not interpreted:
        return "the kernels run on CUDA and ROCm devices"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels take float16, bfloat16 and float32, not {dtype}"
    if choices > MOST_CHOICES:
        return f"the kernels choose among {MOST_CHOICES} factors or projectors at most, not {choices}"
    if device.type == "cuda" and torch.version.hip is None and not torch.compiler.is_compiling():
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return "compute capability 8.0 or newer is needed; this device has {}.{}".format(*capability)
    return None


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype, choices: int = 1) -> str:
    """ "triton" or "torch".  Raises RuntimeError where "triton" was asked for and cannot run.

    "auto" takes Triton on a GPU, and where that cannot run it warns once and takes torch.  Triton's interpreter
    (``TRITON_INTERPRET=1``), which runs the kernels on a CPU for the sake of testing, must be asked for by name, and
    so must the operators of the kernels on the meta device, where "auto" takes torch.
    """
    checks.choice("backend", backend, checks.BACKENDS)
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return "torch"
    reason = why_not_triton(device, dtype, choices)
    if backend == "triton" and reason is not None:
        raise RuntimeError(f"backend='triton' cannot run on {device} with {dtype}: {reason}; backend='torch' can")
    if reason is not None and reason not in _said and not torch.compiler.is_compiling():
        _said.add(reason)
        warnings.warn(f"backend='auto' takes the torch backend on {device}: {reason}", stacklevel=3)
    return "torch" if reason is not None else "triton"


def dydila_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_redundant: Tensor | None = None,
    k_redundant: Tensor | None = None,
    *,
    gamma: Tensor,
    lam: Tensor | None = None,
    kernel_routers: Tensor,
    differential_routers: Tensor | None = None,
    num_heads: int = 1,
    normalization: str = "length",
    router_gradient: str = "none",
    differential: str = "token",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Dynamic differential linear attention of projected tokens: Eqs. 5-8 (or 10) of arXiv 2601.13683.

    Each token of q, k, q', k' is routed to a kernel factor and measured (Eqs. 5-6), each pair of a token and its
    redundancy is routed to a differential factor and subtracted (Eqs. 7-8), and the results attend linearly per head.

    Args:
        q, k, v: (B, N, d), of one dtype: float16, bfloat16, float32 or float64.  Any strides.
        q_redundant, k_redundant: (B, N, d), Q' and K' of Eq. 2; None with ``differential="off"``.
        gamma: (n_F,) kernel factors, used as they are; results are finite for 0.5 <= gamma <= 64 (see normalization).
        lam: (n_D,) differential factors; None with ``differential="off"``.
        kernel_routers: (4, d, n_F) for q, k, q_redundant, k_redundant; (2, d, n_F) for q, k with "off".
        differential_routers: (2, 2d, n_D) for [Q, Q'], [K, K']; (1, 2d, n_D) for [Q, Q'] with ``differential="map"``;
            None with "off".
        num_heads: H, a divisor of d.
        normalization: "length" divides by the number of attended tokens, "none" is Eq. 8 as printed, "denominator"
            divides by the absolute mass, which for lambda = 0 is the denominator of Eq. 4.  With gamma above 16 powers,
            or their products with those of all keys, can underflow in float32: what is left is 0, or near that point an
            output whose gradients need not be finite.
        router_gradient: "none", the argmax as printed, or "straight_through": the same values, and gradients to the
            routers as if the choice were the mean under the softmax of the logits.
        differential: "token" (Eq. 8), "map" (Eq. 10) or "off" (Eq. 6 alone).
        mask: (B, N) bool, True for a token that counts.  Others are not attended to, and their output is zero.
        cu_seqlens: bounds (S + 1,) of S images packed in the one row of B = 1, each attending to itself.  A list of
            ints costs no synchronisation with the device and compiles.  It takes the place of a mask.
        backend: "auto", "triton" or "torch".

    Returns:
        (B, N, d) in the dtype of q; under autocast in the autocast dtype.  Without the convolution of Eq. 9.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it, its value and what was expected.
        RuntimeError: ``backend="triton"`` where it cannot run.
    """
    tensors, options = validated(
        q,
        k,
        v,
        q_redundant,
        k_redundant,
        gamma=gamma,
        lam=lam,
        kernel_routers=kernel_routers,
        differential_routers=differential_routers,
        num_heads=num_heads,
        normalization=normalization,
        router_gradient=router_gradient,
        differential=differential,
        mask=mask,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    return attend(backend, *tensors, **options)


def attend(
    backend: str,
    *tensors: Tensor | None,
    options: Options,
    mask: Tensor | None,
    cu_seqlens: Sequence[int] | None,
) -> Tensor:
    """The core for what :func:`validated` returns."""
    if runs_triton(backend, *tensors):
        return triton_attention(*tensors, options=options, mask=mask, cu_seqlens=cu_seqlens)
    return torch_backend.dydila_attention(*tensors, options=options, mask=mask, cu_seqlens=cu_seqlens)


def runs_triton(backend: str, *tensors: Tensor | None) -> bool:
    """Whether the kernels take this call; torch.func and forward-mode AD are the torch backend's."""
    q, gamma, lam = tensors[0], tensors[5], tensors[6]
    assert q is not None and gamma is not None
    choices = max(len(gamma), 0 if lam is None else len(lam))
    if choose_backend(backend, q.device, q.dtype, choices) != "triton":
        return False
    return not torch_backend.is_transformed()


def triton_attention(
    *tensors: Tensor | None,
    options: Options,
    mask: Tensor | None,
    cu_seqlens: Sequence[int] | None,
    convolution: tuple[Tensor, Tensor | None] | None = None,
    grids: Sequence[Grid] = (),
    ranks: Ranks | None = None,
) -> Tensor:
    """Eqs. 5-8 (or 10), and with ``convolution`` Eq. 9 except at masked tokens, which get zero."""
    from dydila_kernels.ops import backend

    stencil = None if convolution is None else Convolution(*convolution, grids)
    inputs = CoreInputs(*tensors)  # type: ignore[arg-type]
    return backend.attend(inputs, options, mask=mask, cu_seqlens=cu_seqlens, convolution=stencil, ranks=ranks)


def decisions_of(backend: str, *tensors: Tensor | None, **arguments: Any) -> dict[str, Tensor]:
    """The routing decisions that :func:`attend` takes for the same arguments, (B, N) integers each."""
    if not runs_triton(backend, *tensors):
        return torch_backend.routing_indices(*tensors, **arguments)
    from dydila_kernels.ops import backend as kernels

    return kernels.decisions(CoreInputs(*tensors), **arguments)  # type: ignore[arg-type]


def validated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_redundant: Tensor | None = None,
    k_redundant: Tensor | None = None,
    *,
    gamma: Tensor,
    lam: Tensor | None = None,
    kernel_routers: Tensor,
    differential_routers: Tensor | None = None,
    num_heads: int = 1,
    normalization: str = "length",
    router_gradient: str = "none",
    differential: str = "token",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    backend: str = "auto",
) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """The arguments of :func:`dydila_attention`, checked: the tensors and the keyword arguments of the backend."""
    checks.not_traced()
    checks.choice("normalization", normalization, checks.NORMALIZATIONS)
    checks.choice("router_gradient", router_gradient, checks.ROUTER_GRADIENTS)
    checks.choice("differential", differential, checks.DIFFERENTIALS)
    checks.tokens("q", q)
    dim = q.shape[-1]
    checks.heads(dim, num_heads, "d")
    redundant = {"q_redundant": q_redundant, "k_redundant": k_redundant}
    for name, value in {"k": k, "v": v, **({} if differential == "off" else redundant)}.items():
        checks.shaped(name, value, tuple(q.shape), "that of q")

    sides = DIFFERENTIAL_SIDES[differential]
    checks.vector("gamma", gamma, "n_F")
    checks.shaped("kernel_routers", kernel_routers, (4 if sides else 2, dim, len(gamma)), "(routers, d, n_F)")
    if sides:
        checks.vector("lam", lam, "n_D")
        assert lam is not None
        checks.shaped("differential_routers", differential_routers, (sides, 2 * dim, len(lam)), "(routers, 2d, n_D)")
    else:
        for name, value in {**redundant, "lam": lam, "differential_routers": differential_routers}.items():
            if value is not None:
                raise ValueError(f"{name} must be None with differential='off', which has no use for it")

    bounds = None
    if mask is not None:
        checks.mask(mask, q)
    if cu_seqlens is not None:
        bounds = checks.cu_seqlens(cu_seqlens, q)
        checks.warn_of_mask_beside_packing(mask)
        mask = None

    dtype = torch_backend.autocast_dtype(q.device)
    tokens = [q, k, v, q_redundant, k_redundant]
    if dtype is not None:
        tokens = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tokens]
    checks.same(
        "dtype", {"q": tokens[0], "k": tokens[1], "v": tokens[2], "q_redundant": tokens[3], "k_redundant": tokens[4]}
    )
    checks.same(
        "device",
        {"q": q, "k": k, "v": v, **redundant, "gamma": gamma, "lam": lam, "kernel_routers": kernel_routers,
         "differential_routers": differential_routers},
    )  # fmt: skip
    assert tokens[0] is not None
    choose_backend(backend, q.device, tokens[0].dtype, max(len(gamma), 0 if lam is None else len(lam)))
    return (*tokens, gamma, lam, kernel_routers, differential_routers), {
        "options": Options(num_heads, normalization, router_gradient, differential),
        "mask": mask,
        "cu_seqlens": bounds,
    }
