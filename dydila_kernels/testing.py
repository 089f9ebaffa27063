"""For tests, ours and yours: inputs, the layer written in the reference equations, and measures of error.

The oracle is :mod:`dydila_kernels.reference` in float64.  A result in a lower dtype is right if its error is at most
twice the error that the same equations make in plain PyTorch in that dtype, with the same routing decisions: where two
logits differ by less than rounding, either decision is right.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dydila_kernels import reference
from dydila_kernels.attention import DyDiLAttention
from dydila_kernels.functional import TOKENS, validated
from dydila_kernels.types import DIFFERENTIAL_SIDES

Tensors = dict[str, Tensor]


def core_inputs(
    batch: int,
    length: int,
    dim: int,
    *,
    num_kernel_factors: int = 3,
    num_differential_factors: int = 3,
    differential: str = "token",
    gamma: tuple[float, float] = (1.0, 4.0),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensors:
    """Random arguments of :func:`dydila_kernels.dydila_attention` by name; kernel factors spread over ``gamma``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    off = differential == "off"
    sides = DIFFERENTIAL_SIDES[differential]
    inputs = {name: normal(batch, length, dim) for name in (TOKENS[:3] if off else TOKENS)}
    inputs["gamma"] = torch.linspace(*gamma, num_kernel_factors, dtype=torch.float64).to(device, dtype)
    inputs["kernel_routers"] = normal(2 if off else 4, dim, num_kernel_factors, scale=dim**-0.5)
    if sides:
        inputs["lam"] = normal(num_differential_factors, scale=0.3)
        inputs["differential_routers"] = normal(sides, 2 * dim, num_differential_factors, scale=dim**-0.5)
    return inputs


def away_from_kinks(inputs: Mapping[str, Tensor], margin: float = 0.2) -> Tensors:
    """The same with every entry of the tokens pushed ``margin`` away from 0, where ReLU has no derivative."""
    return {name: t + t.sign() * margin if name in TOKENS else t for name, t in inputs.items()}


def decisions(inputs: Mapping[str, Tensor], **options: Any) -> Tensors:
    """The routing decisions that the backend takes for these arguments of the core, (B, N) int64 each."""
    arguments: dict[str, Any] = {**inputs, **options}
    return {name: index.long() for name, index in validated(**arguments).decisions().items()}


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensors:
    """Floating-point tensors in this dtype, others as they are."""
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def output_and_gradients(
    function: Callable[[Tensors], Tensor], inputs: Mapping[str, Tensor], wanted: Sequence[str] | None = None
) -> Tensors:
    """``{"output": function(inputs)}`` and the gradient of each input (or of those ``wanted``, if any) by name.

    The incoming gradient is the same for every call with an output of the same shape, rounded to its dtype.
    """
    leaves = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    names = [name for name, t in leaves.items() if t.requires_grad and (wanted is None or name in wanted)]
    with torch.set_grad_enabled(bool(names)):
        out = function(leaves)
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = {"output": out.detach()}
    if names:
        gradients = torch.autograd.grad(out, [leaves[name] for name in names], incoming.to(out), materialize_grads=True)
        found |= zip(names, gradients, strict=True)
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    """``|found - expected| / |expected|`` in float64; 0 where both are all zero."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    error, size = (found - expected).norm().item(), expected.norm().item()
    return error / size if size else (0.0 if error == 0 else math.inf)


def assert_agree(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-12) -> None:
    """The same names, shapes and, up to a relative error in norm, values."""
    assert found.keys() == expected.keys(), f"{sorted(found)} is not {sorted(expected)}"
    for name, t in found.items():
        assert t.shape == expected[name].shape, f"{name}: shape {tuple(t.shape)}, not {tuple(expected[name].shape)}"
        error = relative_error(t, expected[name])
        assert error <= tolerance, f"{name}: relative error {error:.3g}, allowed {tolerance:.3g}"  # NaN fails too


def error_ratios(
    found: Sequence[Mapping[str, Tensor]], plain: Sequence[Mapping[str, Tensor]], oracle: Sequence[Mapping[str, Tensor]]
) -> dict[str, float]:
    """By name, the median error ``|found - oracle|`` of several runs, divided by the median error of ``plain``.

    Several runs of like inputs, because a tensor of few entries, such as the gradient of gamma, can be close to right
    by chance; medians, because one run can be ill-conditioned: where the mass of a head is almost that of one token,
    the gradient under "denominator" is a small difference, and in either computation wrong by any amount.  A run in
    which plain PyTorch overflows asks of ``found`` no more than to be finite.
    """

    def error(t: Tensor, truth: Tensor) -> float:
        return (t.double() - truth.double()).norm().item()

    def ratio(name: str) -> float:
        runs = [(f[name], p[name], o[name]) for f, p, o in zip(found, plain, oracle, strict=True)]
        if not all(f.isfinite().all() for f, _, _ in runs):
            return math.inf
        comparable = [run for run in runs if run[1].isfinite().all()]
        if not comparable:
            return 0.0
        made = statistics.median(error(f, o) for f, _, o in comparable)
        allowed = statistics.median(error(p, o) for _, p, o in comparable)
        return made / allowed if allowed else math.inf if made else 0.0

    return {name: ratio(name) for name in oracle[0]}


def assert_within_twice_plain(
    found: Sequence[Mapping[str, Tensor]], plain: Sequence[Mapping[str, Tensor]], oracle: Sequence[Mapping[str, Tensor]]
) -> None:
    """The 2x rule, for each name over several runs."""
    ratios = error_ratios(found, plain, oracle)
    wrong = {name: round(ratio, 2) for name, ratio in ratios.items() if not ratio <= 2}
    assert not wrong, f"error over that of plain PyTorch, allowed 2: {wrong}"


def with_distinct_factors(attn: DyDiLAttention) -> DyDiLAttention:
    """The layer, its tables spread in place around their initial values: equal factors give the routers no gradient."""
    with torch.no_grad():
        attn.measure.gamma.add_(torch.linspace(-0.5, 0.5, len(attn.measure.gamma)).to(attn.measure.gamma))
        if attn.differential is not None:
            attn.differential.lam.add_(torch.linspace(-0.4, 0.4, len(attn.differential.lam)).to(attn.differential.lam))
    return attn


def layer_inputs(attn: DyDiLAttention, x: Tensor) -> Tensors:
    """``x`` and the parameters of the layer by name: the inputs of :func:`equations` and :func:`call_layer`."""
    return {"x": x, **{name: parameter.detach() for name, parameter in attn.named_parameters()}}


def call_layer(attn: DyDiLAttention, inputs: Mapping[str, Tensor], **arguments: Any) -> Tensor:
    """``attn(x, **arguments)`` with the parameters taken from ``inputs``."""
    state = {name: t for name, t in inputs.items() if name != "x"}
    return torch.func.functional_call(attn, state, (inputs["x"],), arguments)


def equations(
    attn: DyDiLAttention,
    inputs: Mapping[str, Tensor],
    *,
    mask: Tensor | None = None,
    HW: Any = None,
    cu_seqlens: Sequence[int] | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    rotary_pairing: str = "interleaved",
    indices: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Eqs. 1-10 of the configuration of an unfused ``attn`` without dropout, composed of the reference functions.

    ``inputs`` holds x and the parameters under their state_dict names, in the dtype to compute in.
    """
    x = inputs["x"] if mask is None else inputs["x"].masked_fill(~mask[..., None], 0)
    q, k, v = torch.nn.functional.linear(x, inputs["qkv.weight"], inputs.get("qkv.bias")).chunk(3, -1)
    q, k = normed_tokens(attn, inputs, "q", q), normed_tokens(attn, inputs, "k", k)
    redundant = {}
    for side in "qk" if attn.projection_q is not None else "":
        weight, router = inputs[f"projection_{side}.weight"], inputs[f"projection_{side}.router"]
        index = reference.route(x, router) if indices is None else indices[f"projection_{side}"]
        redundant[side] = normed_tokens(attn, inputs, side, reference.project(x, weight, index))
        if attn.router_gradient == "straight_through":
            redundant[side] = redundant[side] * reference.straight_through_one(x @ router, index)
    if attn.differential is None:
        q, k = redundant.get("q", q), redundant.get("k", k)
        redundant = {}
    stages = (attn.measure, attn.differential)
    kernel_routers, differential_routers = (
        None if stage is None else torch.stack([inputs[f"{prefix}.{name}"] for name in stage.router_names])
        for prefix, stage in zip(("measure", "differential"), stages, strict=True)
    )
    assert kernel_routers is not None
    out = reference.dydila_attention(
        q,
        k,
        v,
        redundant.get("q"),
        redundant.get("k"),
        gamma=inputs["measure.gamma"],
        lam=inputs.get("differential.lam"),
        kernel_routers=kernel_routers,
        differential_routers=differential_routers,
        num_heads=attn.num_heads,
        normalization=attn.normalization,
        router_gradient=attn.router_gradient,
        differential=attn.differential_kind,
        mask=mask,
        cu_seqlens=cu_seqlens,
        rotary=rotary and (rotary[0].to(x.dtype), rotary[1].to(x.dtype)),
        rotary_pairing=rotary_pairing,
        indices=indices,
    )
    if attn.dwc is not None:
        values = v if mask is None else v.masked_fill(~mask[..., None], 0)
        out = out + _convolution(attn, inputs, values, HW, [0, x.shape[1]] if cu_seqlens is None else cu_seqlens)
    out = torch.nn.functional.linear(out, inputs["proj.weight"], inputs.get("proj.bias"))
    return out if mask is None else out.masked_fill(~mask[..., None], 0)


def normed_tokens(attn: DyDiLAttention, inputs: Mapping[str, Tensor], side: str, tokens: Tensor) -> Tensor:
    """Queries or keys after their norm, where there is one, by torch's function."""
    norm: Any = attn.q_norm
    if norm is None:
        return tokens
    weight, bias = inputs[f"{side}_norm.weight"], inputs.get(f"{side}_norm.bias")
    parts, shape = tokens.unflatten(-1, (-1, len(weight))), (len(weight),)
    if attn.qk_norm == "rms":
        return torch.nn.functional.rms_norm(parts, shape, weight, norm.eps).flatten(-2)
    return torch.nn.functional.layer_norm(parts, shape, weight, bias, norm.eps).flatten(-2)


def _convolution(
    attn: DyDiLAttention, inputs: Mapping[str, Tensor], v: Tensor, HW: Any, bounds: Sequence[int]
) -> Tensor:
    """The branches one by one on the grid of each image, zeros at its prefix tokens."""
    assert attn.dwc is not None
    prefix = attn.num_prefix_tokens
    images = []
    for i, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        tokens = v[:, start + prefix : stop]
        if not tokens.shape[1]:  # F.conv2d refuses an image without pixels
            images.append(v[:, start:stop] * 0)
            continue
        side = math.isqrt(tokens.shape[1])
        *frames, rows, columns = (side, side) if HW is None else HW if isinstance(HW[0], int) else HW[i]
        image = tokens.unflatten(1, (*(frames or [1]), rows, columns)).permute(0, 1, 4, 2, 3).flatten(0, 1)
        total = image if "identity" in attn.dwc.names else torch.zeros_like(image)
        for name in attn.dwc.names:
            if name != "identity":
                weight = inputs[f"dwc.branches.{name}"]
                padding = (weight.shape[2] // 2, weight.shape[3] // 2)
                total = total + torch.nn.functional.conv2d(image, weight, padding=padding, groups=attn.dim)
        convolved = total.permute(0, 2, 3, 1).reshape(tokens.shape)
        images.append(torch.nn.functional.pad(convolved, (0, 0, prefix, 0)))
    return torch.cat(images, 1)


def layer_error_ratio(attn: DyDiLAttention, batch: int = 1, length: int = 256, seed: int = 0) -> float:
    """Our error over that of plain PyTorch in the dtype of the layer, for random tokens of a square grid.

    The worse of two ratios: that of the output, and that of the gradients of the input and of all trainable parameters
    together.  Above 2 something is wrong.
    """
    weight = attn.proj.weight
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, attn.dim, generator=generator).to(weight)
    inputs = layer_inputs(attn, x)
    wanted = ["x", *(name for name, parameter in attn.named_parameters() if parameter.requires_grad)]
    indices = attn.routing(x).indices

    def plain(t: Tensors) -> Tensor:
        return equations(attn, t, indices={name: index.to(t["x"].device) for name, index in indices.items()})

    return error_ratio(lambda t: call_layer(attn, t), plain, inputs, wanted)


def error_ratio(
    ours: Callable[[Tensors], Tensor],
    plain: Callable[[Tensors], Tensor],
    inputs: Mapping[str, Tensor],
    wanted: Sequence[str] | None = None,
) -> float:
    """The error of ``ours(inputs)`` over that of ``plain``, the same in plain PyTorch, which is exact in float64.

    The worse of two ratios: that of the output, and that of the gradients of the inputs (or of those ``wanted``, which
    may be none) together.  Above 2 something is wrong.
    """
    # On the CPU: not every device has float64.
    oracle = output_and_gradients(plain, cast({name: t.cpu() for name, t in inputs.items()}, torch.float64), wanted)

    def errors(function: Callable[[Tensors], Tensor]) -> tuple[float, float]:
        found = output_and_gradients(function, inputs, wanted)
        relative = {name: relative_error(t, oracle[name]) for name, t in found.items()}
        return relative.pop("output"), math.hypot(*relative.values())

    pairs = zip(errors(ours), errors(plain), strict=True)
    ratios = [mine / usual if usual else math.inf if mine else 0.0 for mine, usual in pairs]
    return math.nan if any(map(math.isnan, ratios)) else max(ratios)
