"""The functional core: checks of the arguments and the choice of the backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dydila_kernels import checks, torch_backend


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton backend cannot run on this device with this dtype, or None where it can."""
    return "this version of dydila_kernels has no Triton kernels; backend='torch' runs everywhere"


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "triton" or "torch".  Raises RuntimeError where "triton" was asked for and cannot run."""
    checks.choice("backend", backend, checks.BACKENDS)
    if backend == "torch":
        return "torch"
    reason = why_not_triton(device, dtype)
    if backend == "triton" and reason is not None:
        raise RuntimeError(f"backend='triton' cannot run on {device} with {dtype}: {reason}")
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
        gamma: (n_F,) kernel factors, used as they are; results are finite for 0.5 <= gamma <= 64.
        lam: (n_D,) differential factors; None with ``differential="off"``.
        kernel_routers: (4, d, n_F) for q, k, q_redundant, k_redundant; (2, d, n_F) for q, k with "off".
        differential_routers: (2, 2d, n_D) for [Q, Q'], [K, K']; (1, 2d, n_D) for [Q, Q'] with ``differential="map"``;
            None with "off".
        num_heads: H, a divisor of d.
        normalization: "length" divides by the number of attended tokens, "none" is Eq. 8 as printed, "denominator"
            divides by the absolute mass, which for lambda = 0 is the denominator of Eq. 4.  With several heads and
            gamma above 16, a head whose powers all underflow in float32 gives 0.
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
    return torch_backend.dydila_attention(*tensors, **options)


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
    checks.choice("normalization", normalization, checks.NORMALIZATIONS)
    checks.choice("router_gradient", router_gradient, checks.ROUTER_GRADIENTS)
    checks.choice("differential", differential, checks.DIFFERENTIALS)
    checks.tokens("q", q)
    dim = q.shape[-1]
    checks.heads(dim, num_heads, "d")
    redundant = {"q_redundant": q_redundant, "k_redundant": k_redundant}
    for name, value in {"k": k, "v": v, **({} if differential == "off" else redundant)}.items():
        checks.shaped(name, value, tuple(q.shape), "that of q")

    sides = {"token": 2, "map": 1, "off": 0}[differential]
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
    choose_backend(backend, q.device, q.dtype)
    return (*tokens, gamma, lam, kernel_routers, differential_routers), {
        "options": torch_backend.Options(num_heads, normalization, router_gradient, differential),
        "mask": mask,
        "cu_seqlens": bounds,
    }
