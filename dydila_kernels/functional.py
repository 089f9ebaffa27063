"""The functional core: checks of the arguments and the choice of the backend."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor

from dydila_kernels import checks, torch_backend
from dydila_kernels.precision import autocast_dtype
from dydila_kernels.types import DIFFERENTIAL_SIDES, Backend, CoreInputs, Norms, Options, Tables

OLDEST_TRITON = (3, 6)
MAX_TABLE_SIZE = 128
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


def why_not_triton(device: torch.device, dtype: torch.dtype, table_size: int = 1) -> str | None:
    """Why the Triton backend cannot run on this device with this dtype and tables of this size; None: it can."""
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
    if table_size > MAX_TABLE_SIZE:
        return f"the kernels choose among {MAX_TABLE_SIZE} factors or projectors at most, not {table_size}"
    if device.type == "cuda" and torch.version.hip is None and not torch.compiler.is_compiling():
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return "compute capability 8.0 or newer is needed; this device has {}.{}".format(*capability)
    return None


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype, table_size: int = 1) -> str:
    """ "triton" or "torch".  Raises RuntimeError where "triton" was asked for and cannot run.

    "auto" takes Triton on a GPU, and where that cannot run it warns once and takes torch.  Triton's interpreter
    (``TRITON_INTERPRET=1``), which runs the kernels on a CPU for the sake of testing, must be asked for by name, and
    so must the operators of the kernels on the meta device, where "auto" takes torch.
    """
    checks.choice("backend", backend, checks.BACKENDS)
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return "torch"
    reason = why_not_triton(device, dtype, table_size)
    if backend == "triton" and reason is not None:
        raise RuntimeError(f"backend='triton' cannot run on {device} with {dtype}: {reason}; backend='torch' can")
    if reason is not None and reason not in _said and not torch.compiler.is_compiling():
        _said.add(reason)
        warnings.warn(f"backend='auto' takes the torch backend on {device}: {reason}", stacklevel=3)
    return "torch" if reason is not None else "triton"


def backend_of(name: str, device: torch.device, dtype: torch.dtype, table_size: int = 1) -> Backend:
    """The backend of a call: as :func:`choose_backend` says, but torch.func and forward-mode AD are the torch one's."""
    if choose_backend(name, device, dtype, table_size) == "torch" or torch_backend.is_transformed():
        return torch_backend
    from dydila_kernels.ops import backend

    return backend


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
    rotary: tuple[Tensor, Tensor] | Tensor | None = None,
    rotary_pairing: str = "interleaved",
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
        rotary: cos and sin, (N, d/H) or (B, N, d/H) each with an entry for each channel of a head, of any floating
            dtype; or their complex cos + i sin, (N, d/H/2) or (B, N, d/H/2).  Measured and subtracted queries and keys
            are rotated per head; the mass under "denominator" is of those that are not.
        rotary_pairing: the channels of a head that are a pair: "interleaved", 2i and 2i + 1, or "halves", i and
            i + d/H/2.
        backend: "auto", "triton" or "torch".

    Returns:
        (B, N, d) in the dtype of q; under autocast in the autocast dtype.  Without the convolution of Eq. 9.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it, its value and what was expected.
        RuntimeError: ``backend="triton"`` where it cannot run.
    """
    core = validated(
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
        rotary=rotary,
        rotary_pairing=rotary_pairing,
        backend=backend,
    )
    return core.backend.attend(core.inputs, core.options, mask=core.mask, cu_seqlens=core.cu_seqlens)


class CoreCall(NamedTuple):
    """A call of the core after the checks, and who takes it."""

    backend: Backend
    inputs: CoreInputs
    options: Options
    mask: Tensor | None
    cu_seqlens: list[int] | None

    def decisions(self) -> dict[str, Tensor]:
        """The routing decisions that the call takes, (B, N) integers each."""
        return self.backend.decisions(self.inputs, self.options, mask=self.mask, cu_seqlens=self.cu_seqlens)


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
    rotary: tuple[Tensor, Tensor] | Tensor | None = None,
    rotary_pairing: str = "interleaved",
    backend: str = "auto",
) -> CoreCall:
    """The arguments of :func:`dydila_attention`, checked, in the autocast dtype where there is one."""
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
    tables = checks.rotary(rotary, rotary_pairing, q, num_heads)

    inputs = agreeing(
        CoreInputs(q, k, v, q_redundant, k_redundant, gamma, lam, kernel_routers, differential_routers), q.shape
    )
    table_size = max(len(gamma), 0 if lam is None else len(lam))
    chosen = backend_of(backend, q.device, inputs.q.dtype, table_size)
    options = Options(num_heads, normalization, router_gradient, differential, tables, rotary_pairing)
    return CoreCall(chosen, inputs, options, mask, bounds)


def core_inputs(
    tokens: Sequence[Tensor], redundant: Sequence[Tensor], norms: Norms, tables: Tables, differential: str
) -> CoreInputs:
    """What the core takes of q, k, v and the norms of q and k, of Q' and K' after theirs (or none), and of the tables.

    Without a difference the measured tokens are those of the routed projectors, where there are any.
    """
    q, k, v = tokens
    q_redundant, k_redundant = redundant or (None, None)
    if differential == "off" and redundant:
        q, k = redundant
        q_redundant, k_redundant = None, None
    elif norms:
        q, k = (norm(t) for norm, t in zip(norms, (q, k), strict=True))
    return CoreInputs(q, k, v, q_redundant, k_redundant, *tables)


FIELDS = CoreInputs._fields
TOKENS = FIELDS[:5]


def agreeing(inputs: CoreInputs, shape: Sequence[int]) -> CoreInputs:
    """The same, tokens in the autocast dtype where there is one.

    Raises ValueError where tokens have another shape than this or differ in dtype, or tensors in device.
    """
    # (The Dynamo of torch 2.6 to 2.9 follows neither _replace nor _asdict.)
    dtype = autocast_dtype(inputs.q.device)
    named: dict[str, Tensor | None] = dict(zip(FIELDS, inputs, strict=True))
    for name in TOKENS:
        t = named[name]
        if t is not None:
            checks.shaped(name, t, tuple(shape), "(B, N, d)")
            named[name] = t if dtype is None or t.dtype == torch.float64 else t.to(dtype)
    checks.same("dtype", {name: named[name] for name in TOKENS})
    checks.same("device", named)
    return CoreInputs(**named)  # type: ignore[arg-type]
