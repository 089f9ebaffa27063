"""DyDiLAttention: the layer of the paper as a drop-in for the self-attention of a vision transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dydila_kernels import checks, routing, torch_backend
from dydila_kernels.checks import CheckedArgs, is_plain
from dydila_kernels.depthwise import DepthwiseConv, kernel_of
from dydila_kernels.differential import TokenDifferential
from dydila_kernels.functional import agreeing, backend_of, core_inputs
from dydila_kernels.linear import linear
from dydila_kernels.measure import DynamicMeasureKernel
from dydila_kernels.norms import NORMS, check_norm, norm_of, normed
from dydila_kernels.precision import autocast_dtype
from dydila_kernels.projection import DynamicProjection, choices
from dydila_kernels.routing import Routing
from dydila_kernels.thirds import thirds_of
from dydila_kernels.torch_backend import depthwise, takes_blocks
from dydila_kernels.types import (
    Backend,
    Convolution,
    CoreInputs,
    Grids,
    LayerWeights,
    Linear,
    Norms,
    Options,
    Projector,
    Tables,
    Video,
)


class DyDiLAttention(nn.Module):
    """Dynamic Differential Linear Attention, Eqs. 1-9 of arXiv 2601.13683.

    ``attn(x)`` maps tokens (B, N, d) of an image, in row-major order, to (B, N, d), in time and memory linear in N.
    ``qkv`` and ``proj`` have the shapes and names of a timm or DiT attention, whose weights load into them.

    Args:
        dim: d, channels of a token.
        num_heads: H, a divisor of d.  Norms, routing and factors are per token, whatever H is.  The paper has 1.
        qkv_bias, proj_bias: biases of the shared and of the output projection.
        proj_drop: dropout on the output, in [0, 1).
        num_projectors: n_P of Eq. 2, at least 1, or 0 with ``differential="off"``.
        num_kernel_factors: n_F of Eq. 6.
        num_differential_factors: n_D of Eq. 7.
        gamma_init: initial kernel factor, finite and positive.
        lambda_init: initial differential factor, finite.
        normalization: "length" divides by the number of attended tokens; "none" is Eq. 8 as printed, whose output
            grows with N; "denominator" divides by the absolute mass, which for lambda = 0 is Eq. 4.
        router_gradient: "none": routers are fixed random partitions with ``requires_grad=False``; "straight_through":
            the same output, and gradients through the softmax of the logits.
        differential: "token" (Eq. 8), "map" (Eq. 10) or "off".  With "off" the measured tokens are those of the routed
            projectors, or with ``num_projectors=0`` the shared Q and K.
        dwc_branches: branches of the depth-wise convolution of Eq. 9, among "3x3", "1x3", "3x1", "1x1" and
            "identity"; ``()`` leaves it out.
        qk_norm: "rms" or "layer": torch's norm of queries and of keys before they are measured; None for none.  The
            redundant ones, Q' and K', go through the same norms.
        qk_norm_across: what is normed: each "head", or the whole "token".
        qk_norm_eps: finite and positive.  timm's vision transformers, Stable Diffusion 3.5 and Wan have 1e-6,
            diffusers' Sana 1.5 and SANA-Video 1e-5.
        num_prefix_tokens: class or register tokens before the grid; they attend, and the convolution skips them.
        backend: "auto", "triton" or "torch".
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it, its value and what was expected.
        RuntimeError: ``backend="triton"`` where it cannot run (raised by the call, which knows the device).
    """

    has_all_tokens = True
    """Whether a call has all tokens of its images, and not a range of them on this rank."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        num_projectors: int = 3,
        num_kernel_factors: int = 9,
        num_differential_factors: int = 9,
        gamma_init: float = 3.0,
        lambda_init: float = 0.01,
        normalization: str = "length",
        router_gradient: str = "none",
        differential: str = "token",
        dwc_branches: Sequence[str] = ("3x3", "1x3", "3x1"),
        qk_norm: str | None = None,
        qk_norm_across: str = "head",
        qk_norm_eps: float = 1e-6,
        num_prefix_tokens: int = 0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dim = checks.integer("dim", dim, 1)
        num_heads = checks.heads(dim, num_heads)
        checks.boolean("qkv_bias", qkv_bias)
        checks.boolean("proj_bias", proj_bias)
        checks.number("proj_drop", proj_drop)
        if not 0 <= proj_drop < 1:
            raise ValueError(f"proj_drop must be in [0, 1); got {proj_drop}")
        checks.choice("differential", differential, checks.DIFFERENTIALS)
        num_projectors = checks.integer("num_projectors", num_projectors, 0 if differential == "off" else 1)
        num_kernel_factors = checks.integer("num_kernel_factors", num_kernel_factors, 1)
        num_differential_factors = checks.integer("num_differential_factors", num_differential_factors, 1)
        checks.number("gamma_init", gamma_init, above=0)
        checks.number("lambda_init", lambda_init)
        checks.choice("normalization", normalization, checks.NORMALIZATIONS)
        checks.choice("router_gradient", router_gradient, checks.ROUTER_GRADIENTS)
        checks.branches("dwc_branches", dwc_branches)
        check_norm(qk_norm, qk_norm_across, qk_norm_eps)
        num_prefix_tokens = checks.integer("num_prefix_tokens", num_prefix_tokens, 0)
        checks.choice("backend", backend, checks.BACKENDS)
        super().__init__()
        self.dim, self.num_heads, self.num_prefix_tokens = dim, num_heads, num_prefix_tokens
        self.normalization, self.router_gradient, self.differential_kind = normalization, router_gradient, differential
        self.qk_norm, self.qk_norm_across = qk_norm, qk_norm_across
        self.backend, self.fused = backend, False
        factors = (num_kernel_factors, 1 if differential == "off" else num_differential_factors)
        self.max_table_size = max(num_projectors, *factors)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        routed: dict[str, Any] = {"trainable_routers": router_gradient == "straight_through", **factory}
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.q_norm, self.k_norm = (
            norm_of(qk_norm, qk_norm_across, dim, num_heads, qk_norm_eps, **factory) if qk_norm else None for _ in "qk"
        )
        self.projection_q = DynamicProjection(dim, num_projectors, **routed) if num_projectors else None
        self.projection_k = DynamicProjection(dim, num_projectors, **routed) if num_projectors else None
        self.measure = DynamicMeasureKernel(
            dim, num_kernel_factors, gamma_init=gamma_init, redundant=differential != "off", **routed
        )
        sides = {"token": ("q", "k"), "map": ("q",), "off": ()}[differential]
        routed |= {"lambda_init": lambda_init, "sides": sides}
        self.differential = TokenDifferential(dim, num_differential_factors, **routed) if sides else None
        self.dwc = DepthwiseConv(dim, dwc_branches, **factory) if dwc_branches else None
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        HW: Sequence[int] | Sequence[Sequence[int]] | None = None,
        *,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        rotary: tuple[Tensor, Tensor] | Tensor | None = None,
        rotary_pairing: str = "interleaved",
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        **others: None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, N, d), in the dtype of the weights (any floating dtype under autocast): the prefix tokens, then the
                grid in row-major order, or the grids of the frames of a video.
            mask: (B, N) bool, True for a real token.  Others are not attended to and get zeros, whatever they hold.
            HW: (rows, columns) of the grid; None for a square one.  (frames, rows, columns) for a video: all its tokens
                attend to each other, and the convolution is that of each frame.  With ``cu_seqlens`` a list, one for
                each image or video.
            cu_seqlens: bounds (S + 1,) of S images packed in the one row of B = 1; a list of ints compiles.  A mask
                beside it is ignored with a warning.
            rotary, rotary_pairing: rotary embeddings of all N tokens, as in :func:`dydila_kernels.dydila_attention`; a
                prefix token with cos 1 and sin 0 stays as it is.
            attn_mask: another name for ``mask``.
            is_causal: must be False; the attention is bidirectional.
            others: what callers of other layers pass by name; must be None.

        Returns:
            (B, N, d), in the dtype that ``nn.Linear`` would give.  NaN or infinity in a token that counts leaves no
            finite output in its image, and changes no other image.

        Raises:
            TypeError, ValueError: an argument is not as described, or the attention is to be causal.
            RuntimeError: ``backend="triton"`` where it cannot run; gradients are asked of a fused layer.
        """
        checks.unused(others, is_causal)
        call = self._checked(x, checks.mask_of(mask, attn_mask), HW, cu_seqlens, rotary, rotary_pairing)
        backend = self._backend(call)
        weights = self._plain_weights(call) if backend is torch_backend else None
        if weights is None:
            y = linear(self.proj, self._attention(call, backend))
        else:
            y = torch_backend.layer(call.x, weights, self._options(call), call.mask, call.cu_seqlens)
        return call.visible(self.proj_drop(y))

    def routing(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """The routing decisions that the forward pass takes for these tokens, and how often each choice is taken.

        x and mask as in :meth:`forward`, which raises the same errors.
        """
        call = self._checked(x, mask, needs_grid=False)
        with torch.no_grad():
            return routing.routing_of(self, call.x, call.mask, self._backend(call))

    def balance_loss(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """A loss () that evens the usage of the routers; add a small multiple, say 0.01, to the training loss.

        The mean over the routers of n sum_f usage_f probability_f (Switch Transformer, arXiv 2101.03961, Eq. 4), which
        is 1 where all n choices are equally used.  x and mask as in :meth:`forward`.

        Raises:
            RuntimeError: ``router_gradient`` is "none", so the routers are fixed.
        """
        call = self._checked(x, mask, needs_grid=False)
        return routing.balance_loss_of(self, call.x, call.mask, self._backend(call))

    def load_attention(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Loads ``qkv``, ``proj`` and the norms of a timm or DiT attention, and names the parameters that stay new.

        Strict: the state_dict must hold all of the weights and biases that ``qkv``, ``proj``, ``q_norm`` and ``k_norm``
        of this layer have, in their shapes, and nothing else.

        Args:
            state_dict: ``qkv.weight`` (3d, d), ``proj.weight`` (d, d) and, where this layer has them, ``qkv.bias``
                (3d,), ``proj.bias`` (d,), ``q_norm.weight``, ``k_norm.weight`` and their biases (d/H or d,), of any
                floating dtype: they take that of the layer.

        Returns:
            The names of the parameters of this layer that were not loaded.

        Raises:
            ValueError: it holds less or more; the message names what.
            TypeError: a value is no tensor of a floating dtype.
            RuntimeError: a shape differs.
        """
        parts = ("qkv.", "proj.", "q_norm.", "k_norm.")
        wanted = {name: t for name, t in self.state_dict().items() if name.startswith(parts)}
        checks.weights("state_dict", state_dict, wanted)
        return list(self.load_state_dict(state_dict, strict=False).missing_keys)

    def fuse(self) -> DyDiLAttention:
        """Turns the layer into its inference form, in place, and returns it: one 3x3 kernel, stacked routers.

        The output is the same.  Asking twice changes nothing.  The layer cannot be trained afterwards, and takes other
        weights through ``load_state_dict`` only, which accepts those of an unfused layer, too.
        """
        if not self.fused:
            self.eval()
            if self.dwc is not None:
                self.dwc.fuse()
            self.measure.pack()
            if self.differential is not None:
                self.differential.pack()
            self.requires_grad_(False)
            self.fused = True
        return self

    def train(self, mode: bool = True) -> DyDiLAttention:
        """As :meth:`torch.nn.Module.train`.  Raises RuntimeError where a fused layer is to train."""
        if mode and self.fused:
            raise RuntimeError("a layer cannot train after fuse(); keep an unfused copy (copy.deepcopy) to train")
        return super().train(mode)

    def extra_repr(self) -> str:
        text = (
            f"{self.dim}, num_heads={self.num_heads}, normalization={self.normalization!r}, "
            f"router_gradient={self.router_gradient!r}, differential={self.differential_kind!r}, "
            f"num_prefix_tokens={self.num_prefix_tokens}, backend={self.backend!r}"
        )
        if self.qk_norm is not None:
            text += f", qk_norm={self.qk_norm!r}, qk_norm_across={self.qk_norm_across!r}"
        return text + ", fused" if self.fused else text

    def _checked(
        self,
        x: Tensor,
        mask: Tensor | None,
        HW: Any = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        rotary: Any = None,
        rotary_pairing: str = "interleaved",
        *,
        needs_grid: bool = True,
    ) -> CheckedArgs:
        checks.not_traced()
        checks.tokens("x", x, self.dim)
        # A hooked or replaced projection may have weights of any kind, or none.
        dtype = getattr(getattr(self.proj, "weight", None), "dtype", x.dtype)
        if x.dtype != dtype and is_plain(self.proj, nn.Linear) and autocast_dtype(x.device) is None:
            raise TypeError(f"x must have the dtype of the weights, {dtype}, outside autocast; got {x.dtype}")
        if self.fused and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            raise RuntimeError("a layer cannot train after fuse(), but some of its parameters require a gradient")
        if mask is not None:
            checks.mask(mask, x)
        bounds = None
        if cu_seqlens is not None:
            bounds = checks.cu_seqlens(cu_seqlens, x)
            checks.warn_of_mask_beside_packing(mask)
            mask = None
        grids: Grids = []
        if needs_grid and (HW is not None or self.dwc is not None):
            grids = checks.grids(HW, x.shape[1], bounds, self.num_prefix_tokens)
        tables = checks.rotary(rotary, rotary_pairing, x, self.num_heads)
        x = x if mask is None else x.masked_fill(~mask[..., None], 0)
        return CheckedArgs(x, mask, grids, bounds, tables, rotary_pairing)

    @property
    def options(self) -> Options:
        """What the core is told beside tensors."""
        return Options(self.num_heads, self.normalization, self.router_gradient, self.differential_kind)

    def _options(self, call: CheckedArgs) -> Options:
        num_heads, normalization, router_gradient, differential, *_ = self.options
        return Options(num_heads, normalization, router_gradient, differential, call.rotary, call.rotary_pairing)

    def _backend(self, call: CheckedArgs) -> Backend:
        """Raises RuntimeError where "triton" was asked for and cannot run."""
        device, dtype = call.x.device, autocast_dtype(call.x.device) or call.x.dtype
        return backend_of(self.backend, device, dtype, self.max_table_size)

    def _plain_weights(self, call: CheckedArgs) -> LayerWeights | None:
        """All weights, where nothing asks for the tensors in between: no autocast, tracer, or module whose call is more
        than its equation; nor gradients that the layer in blocks has not."""
        x, linears = call.x, (self.qkv, self.proj)
        if autocast_dtype(x.device) is not None or not takes_blocks(x):
            return None
        projections = [p for p in (self.projection_q, self.projection_k) if p is not None]
        plain = [is_plain(each, nn.Linear) for each in linears] + [is_plain(p, DynamicProjection) for p in projections]
        norms = [norm for norm in (self.q_norm, self.k_norm) if norm is not None]
        if not all(plain) or (norms and (torch.is_grad_enabled() or torch.compiler.is_compiling())):
            return None
        if torch.is_grad_enabled() and not torch_backend.differentiates(x, self._options(call)):
            return None
        if not all(any(is_plain(norm, kind) for kind in NORMS.values()) for norm in norms):
            return None
        multiplied = [each.weight for each in linears] + [projection.weight for projection in projections]
        if any(weight.dtype != x.dtype for weight in multiplied):
            return None
        return LayerWeights(
            Linear(self.qkv.weight, self.qkv.bias),
            tuple(Projector(projection.weight, projection.router) for projection in projections),
            self._norms(),
            self._tables(),
            self._convolution(call.grids, torch_backend),
            Linear(self.proj.weight, self.proj.bias),
        )

    def _convolves_apart(self, call: CheckedArgs, backend: Backend) -> bool:
        """Whether torch convolves, after the kernels: they do not know of frames."""
        return backend is not torch_backend and any(isinstance(grid, Video) for grid in call.grids)

    def _attention(self, call: CheckedArgs, backend: Backend) -> Tensor:
        """Eqs. 1-9: (B, N, d)."""
        inputs, convolution = self._core_inputs(call.x, backend), self._convolution(call.grids, backend)
        attend = partial(backend.attend, inputs, self._options(call), mask=call.mask, cu_seqlens=call.cu_seqlens)
        if convolution is not None and self._convolves_apart(call, backend):
            return depthwise(attend(), call.visible(inputs.v), convolution)
        return attend(convolution=convolution)

    def _core_inputs(self, x: Tensor, backend: Backend) -> CoreInputs:
        """Q, K, V, Q', K' of Eqs. 1-2, and the tables."""
        tokens = thirds_of(self.qkv, x)
        inputs = core_inputs(tokens, self._redundant(x, backend), self._norms(), self._tables(), self.differential_kind)
        return agreeing(inputs, x.shape)

    def _redundant(self, x: Tensor, backend: Backend) -> list[Tensor]:
        """Q', K' of Eq. 2 after their norms, or nothing where the layer has no projectors."""
        projections = [p for p in (self.projection_q, self.projection_k) if p is not None]
        norms = self._norms() or (None, None)
        if projections and all(is_plain(p, DynamicProjection) for p in projections):
            chosen = choices(x, projections, backend)
            return [p(x, choice, backend, norm) for p, choice, norm in zip(projections, chosen, norms, strict=True)]
        redundant = []
        for p, norm in zip(projections, norms[: len(projections)], strict=True):
            if not checks.is_replaced(p, DynamicProjection):
                redundant.append(p(x, None, backend, norm))
            else:  # which knows of x alone
                redundant.append(p(x) if norm is None else norm(p(x)))
        return redundant

    def _norms(self) -> Norms:
        heads = self.num_heads if self.qk_norm_across == "head" else 1
        return tuple(partial(normed, norm, heads) for norm in (self.q_norm, self.k_norm) if norm is not None)

    def _tables(self) -> Tables:
        lam, differential_routers = (None, None) if self.differential is None else self.differential()
        gamma, kernel_routers = self.measure()
        return gamma, lam, kernel_routers, differential_routers

    def _convolution(self, grids: Grids, backend: Backend) -> Convolution | None:
        if self.dwc is None:
            return None
        weight, bias = kernel_of(self.dwc, backend)
        return Convolution(weight, bias, grids)

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError("torch.jit.script is not supported; use torch.compile or torch.export.export")
