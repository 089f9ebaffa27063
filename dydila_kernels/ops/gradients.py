"""The backward pass of one side, queries or keys: from the gradient of Zh to those of Z, Z', gamma, lambda and routers.

With the notation of :mod:`dydila_kernels.ops.tokens`, G = dL/dphi(Z), c = p . G and t = G - p c / |p|^2 per row,

    dZ = (scale/m) gamma (p/s) t + c / (|p|^2 scale/m) s      where Z > 0,          scale/m = |s| / |p|
    dgamma = scale ln 2 sum p log2(s) t

so the scale of the row appears in dgamma alone.  From dy = dL/dZh: G = dy for phi(Z), -lambda dy for phi(Z'), and
dlambda = -phi(Z') . dy.  "denominator" adds the gradient u of the mass: G += u and |lambda| u, dlambda += sign(lambda)
phi(Z') . u.  Straight through, dlogits = slopes dgamma (or dlambda), dZ += dlogits_F R_F^T and G += dlogits_D R_D^T.

dy is read, or made anew as X M^T per head: dO S^T for queries, V dS^T for keys.  The kernel walks over its rows twice,
for the sums over a row and then for dZ (three times straight through, where dlambda comes before c and dgamma).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dydila_kernels.ops import configs
from dydila_kernels.ops.call import Call, Side
from dydila_kernels.ops.linear_attention import write_readout
from dydila_kernels.ops.tiles import TINY, launch, log2, numerics, padded, row_dot, rows_of_program, within
from dydila_kernels.ops.tokens import (
    difference_of,
    load_factor,
    load_measured,
    load_per_head,
    powers_of,
    reciprocal,
    row_pointers,
    store_choices,
    unit_of,
    weighted,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_operand(X, h, image, n, batch, row, live, E: tl.constexpr):
    """X_h (R, e padded) of X (B, N, d), with which the chunks of dy are products."""
    across = tl.arange(0, padded(E))
    pointers = X + (image * batch + n * row)[:, None] + h * E + across[None, :]
    return tl.load(pointers, mask=within(live, across, E, padded(E)), other=0.0)


@triton.jit
def incoming(x, MATRIX, GIVEN, INVERSE_MASS, MASS_WEIGHTS, MASS_VECTOR, h, columns, r, live, rescale, E: tl.constexpr,
             H: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dy and u (R, C) of some columns of head h; u is None without a mass.  MATRIX (H, e, e), GIVEN (T, d)."""
    if GIVEN is not None:
        mask = within(live, columns, E, COLUMNS)
        dy = tl.load(GIVEN + (r * H + h)[:, None] * E + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        across = tl.arange(0, padded(E))
        matrix = MATRIX + (h * E + columns[None, :]) * E + across[:, None]
        matrix = tl.load(matrix, mask=(across < E)[:, None] & (columns < E)[None, :], other=0.0)
        dy = tl.dot(x, matrix, input_precision=PRECISION)
    dy *= rescale
    if INVERSE_MASS is not None:
        dy *= load_per_head(INVERSE_MASS, h, r, live, H)[:, None]
    if MASS_VECTOR is None:
        return dy, None
    else:
        u = tl.load(MASS_VECTOR + h * E + columns, mask=columns < E, other=0.0)[None, :]
        if MASS_WEIGHTS is None:
            return dy, tl.where(live[:, None], u, 0.0)
        else:
            return dy, u * load_per_head(MASS_WEIGHTS, h, r, live, H)[:, None]


@triton.jit
def add_routed(acc, dlogits, ROUTER, at, real, CHOICES: tl.constexpr, PRECISION: tl.constexpr):
    """acc (R, C) + dlogits ROUTER^T: what the logits of ROUTER (d, n) pass on to the channels ``at`` (C,) of tokens."""
    choices = tl.arange(0, padded(CHOICES))
    mask = (choices < CHOICES)[:, None] & real[None, :]
    router = tl.load(ROUTER + at[None, :] * CHOICES + choices[:, None], mask=mask, other=0.0).to(tl.float32)
    return tl.dot(dlogits, router, acc, input_precision=PRECISION)


@triton.jit
def gradient_of_phi(dy, u, a_map, dlogits, ROUTER, at, real, N_D: tl.constexpr, PRECISION: tl.constexpr):
    """G (R, C) of one map; dlogits (R, n_D padded) of ROUTER (d, n_D), or None."""
    g = dy * a_map[4][:, None]
    if u is not None:
        g += u * a_map[5][:, None]
    if dlogits is not None:
        g = add_routed(g, dlogits, ROUTER, at, real, N_D, PRECISION)
    return g


@triton.jit
def power_parts(rows, measured, at, mask, FAST: tl.constexpr):
    """s, log2 s and q = p/s = s^(gamma - 1) of a tile (R, C) of one map; q is zero where s is."""
    inverse, gamma, _ = measured
    s = unit_of(tl.load(rows + at[None, :], mask=mask, other=0.0), inverse)
    log = log2(tl.maximum(s, TINY), FAST)
    return s, log, tl.where(s < TINY, 0.0, tl.exp2((gamma - 1.0)[:, None] * log))


@triton.jit
def map_sums(sums, rows, measured, g, at, mask, FAST: tl.constexpr):
    """The sums (R,) of p G, p log2(s) G and p^2 log2(s), plus those of another tile (R, C)."""
    s, log, q = power_parts(rows, measured, at, mask, FAST)
    p = q * s
    return (
        sums[0] + row_dot(p, g),
        sums[1] + row_dot(p * log, g),
        sums[2] + row_dot(p * p, log),
    )


@triton.jit
def gamma_gradient(sums, scale, POWER, r, live, FAST: tl.constexpr):
    """dgamma (R,) from :func:`map_sums` and |p|^2, POWER (T,)."""
    power = tl.load(POWER + r, mask=live, other=0.0)
    return scale * LN2 * (sums[1] - sums[0] * reciprocal(power, FAST) * sums[2])


@triton.jit
def store_gradient(DZ, total, rows, measured, c, POWER, g, dlogits, ROUTER, r, at, real, inside, live, D: tl.constexpr,
                   N_F: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Writes dZ of a tile (R, C) of one map; returns the sum (R,) of p log2(s) t, plus that of other tiles."""
    inverse, gamma, scale = measured
    s, log, q = power_parts(rows, measured, at, live[:, None] & real[None, :], FAST)
    power = tl.load(POWER + r, mask=live, other=0.0)
    ratio = scale * inverse
    t = q * (g - (q * s) * (c * reciprocal(power, FAST))[:, None])
    dz = (ratio * gamma)[:, None] * t + (c * reciprocal(power * ratio, FAST))[:, None] * s
    if dlogits is not None:
        dz = add_routed(dz, dlogits, ROUTER, at, real, N_F, PRECISION)
    dz = tl.where(live[:, None], dz, 0.0).to(DZ.dtype.element_ty)
    tl.store(DZ + r[:, None] * D + at[None, :], dz, mask=inside[:, None] & real[None, :])
    return total + row_dot(s * log, t)


@triton.jit
def slopes_times(SLOPES, OUT, values, r, live, inside, CHOICES: tl.constexpr):
    """dlogits (R, n padded) = slopes (T, n) times the gradient of what they chose (R,), kept in OUT (T, n)."""
    dlogits = load_choices(SLOPES, r, live, CHOICES) * values[:, None]
    store_choices(OUT, dlogits, r, inside, CHOICES)
    return dlogits


@triton.jit
def load_choices(IN, r, live, CHOICES: tl.constexpr):
    """Rows r of IN (T, n) as (R, n padded), zero outside."""
    choices = tl.arange(0, padded(CHOICES))
    mask = live[:, None] & (choices < CHOICES)[None, :]
    return tl.load(IN + r[:, None] * CHOICES + choices[None, :], mask=mask, other=0.0)


@triton.jit
def chosen_sum(values, INDEX, r, live, CHOICES: tl.constexpr):
    """The sum of values (R,) over the rows that chose each entry of a table: (n padded,)."""
    choices = tl.arange(0, padded(CHOICES))
    index = tl.load(INDEX + r, mask=live, other=0).to(tl.int32)
    chosen = (index[:, None] == choices[None, :]) & live[:, None]
    return tl.sum(tl.where(chosen, values[:, None], 0.0), axis=0)


@triton.jit
def store_table(OUT, sums, CHOICES: tl.constexpr):
    choices = tl.arange(0, padded(CHOICES))
    tl.store(OUT + tl.program_id(0).to(tl.int64) * CHOICES + choices, sums, mask=choices < CHOICES)


@triton.jit
def mass_gradient_kernel(Z1, Z2, X, MATRIX, GIVEN, INDEX, CHOICE, STATS, GAMMA, LAM, TILES, INVERSE_MASS, OUT, N, T,
                         rescale, batch1, row1, batch2, row2, x_batch, x_row, D: tl.constexpr, H: tl.constexpr,
                         ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
                         PRECISION: tl.constexpr):  # fmt: skip
    """OUT (T, H) = dL/dmass = -(Zh_h . dy_h) / mass of queries under "denominator".

    The other arguments as in :func:`gradients_kernel`.
    """
    E: tl.constexpr = D // H
    image, segment, n, inside = rows_of_program(TILES, N, ROWS)
    r, T = image * N + n, tl.cast(T, tl.int64)
    rows = row_pointers(Z1, Z2, image, n, batch1, row1, batch2, row2)
    measured = load_measured(rows, INDEX, STATS, GAMMA, r, inside, T)
    maps, alive, _ = weighted(rows, measured, load_factor(CHOICE, LAM, r, inside), None, segment, 1.0, True, FAST)
    live = inside & alive
    matrix = None if MATRIX is None else MATRIX + segment * (D * E)
    for h in range(0, H):
        x = None if GIVEN is not None else load_operand(X, h, image, n, x_batch, x_row, live, E)
        total = tl.zeros(r.shape, tl.float32)
        for c in range(0, E, COLUMNS):
            columns = c + tl.arange(0, COLUMNS)
            dy = incoming(
                x, matrix, GIVEN, INVERSE_MASS, None, None, h, columns, r, live, rescale, E, H, COLUMNS, PRECISION
            )[0]
            powers = powers_of(maps, h * E + columns, within(live, columns, E, COLUMNS), FAST)
            total += row_dot(difference_of(powers, maps), dy)
        tl.store(OUT + r * H + h, -total * load_per_head(INVERSE_MASS, h, r, live, H), mask=inside)


@triton.jit
def gradients_kernel(Z1, Z2, X, MATRIX, GIVEN, DZ1, DZ2, DX, MASK, ROUTER1, ROUTER2, ROUTER_D, GAMMA, LAM, INDEX,
                     CHOICE, STATS, SLOPES, SLOPES_D, DLOGITS, DLOGITS_D, DGAMMA, DLAM, FACTORS, TILES, INVERSE_MASS,
                     MASS_WEIGHTS, MASS_VECTOR, GRAD, WEIGHT, GRIDS, N, T, unit, rescale, batch1, row1, batch2, row2,
                     x_batch, x_row, grad_batch, grad_row, grid_start, grid_rows, grid_columns, D: tl.constexpr,
                     H: tl.constexpr, N_F: tl.constexpr, N_D: tl.constexpr,
                     RELATIVE: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                     FAST: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One program for a tile of ROWS tokens of one side, all channels.

    X (B, N, d) with strides x_batch, x_row and MATRIX (segments, H, e, e), or GIVEN (T, d): where dy comes from;
    DZ1, DZ2 (T, d); DGAMMA (programs, n_F), DLAM (programs, n_D) float32; INVERSE_MASS, MASS_WEIGHTS (T, H) and
    MASS_VECTOR (segments, d) float32, or None.
    Straight through SLOPES (maps, T, n_F), and for the gradients of the logits DLOGITS of that shape and DLOGITS_D
    (T, n_D), which is read where SLOPES_D (T, n_D) is None; otherwise all are None.
    DX (T, d) = rescale Zh MATRIX and, with WEIGHT (9, d), the mirrored convolution of GRAD (B, N, d): dV; or None.
    The other arguments as in :func:`tokens_kernel` and :func:`readout_kernel`.
    """
    E: tl.constexpr = D // H
    PAIR: tl.constexpr = Z2 is not None
    image, segment, n, inside = rows_of_program(TILES, N, ROWS)
    r, T = image * N + n, tl.cast(T, tl.int64)
    rows = row_pointers(Z1, Z2, image, n, batch1, row1, batch2, row2)
    measured = load_measured(rows, INDEX, STATS, GAMMA, r, inside, T)
    factor = load_factor(CHOICE, LAM, r, inside)
    maps, alive, extra = weighted(rows, measured, factor, FACTORS, segment, unit, RELATIVE, FAST)
    live = inside & alive
    if MATRIX is not None:
        MATRIX += segment * (D * E)
    if MASS_VECTOR is not None:
        MASS_VECTOR += segment * D
    chunk = tl.arange(0, COLUMNS)

    # First walk: p . dy and p . u of each map, of which c and dlambda are made.
    zero = tl.zeros(r.shape, tl.float32)
    dot1, dot2, mass1, mass2 = zero, zero, zero, zero
    for h in range(0, H):
        x = None if GIVEN is not None else load_operand(X, h, image, n, x_batch, x_row, live, E)
        for c in range(0, E, COLUMNS):
            dy, u = incoming(x, MATRIX, GIVEN, INVERSE_MASS, MASS_WEIGHTS, MASS_VECTOR, h, c + chunk, r, live, rescale,
                             E, H, COLUMNS, PRECISION)  # fmt: skip
            powers = powers_of(maps, h * E + c + chunk, within(live, c + chunk, E, COLUMNS), FAST)
            dot1 += row_dot(powers[0], dy)
            if PAIR:
                dot2 += row_dot(powers[1], dy)
            if u is not None:
                mass1 += row_dot(powers[0], u)
                if PAIR:
                    mass2 += row_dot(powers[1], u)
    c1 = maps[0][4] * dot1 + maps[0][5] * mass1
    c2 = zero
    if PAIR:
        c2 = maps[1][4] * dot2 + maps[1][5] * mass2
    dlogits = None
    if CHOICE is not None:
        dlambda = -measured[0][2] * extra * dot1
        if PAIR:
            sign = tl.where(factor > 0, 1.0, tl.where(factor < 0, -1.0, 0.0))
            dlambda = -measured[1][2] * extra * (dot2 + sign * mass2)
        store_table(DLAM, chosen_sum(dlambda, CHOICE, r, live, N_D), N_D)
        if SLOPES_D is not None:
            dlogits = slopes_times(SLOPES_D, DLOGITS_D, dlambda, r, live, inside, N_D)
    if DLOGITS_D is not None and SLOPES_D is None:
        dlogits = load_choices(DLOGITS_D, r, live, N_D)

    # Straight through a second walk: c with the share of the lambda router, and dgamma before dZ.
    second = None if ROUTER_D is None else ROUTER_D + D * N_D
    routed1, routed2 = None, None
    if SLOPES is not None:
        sums1, sums2 = (zero, zero, zero), (zero, zero, zero)
        for h in range(0, H):
            x = None if GIVEN is not None else load_operand(X, h, image, n, x_batch, x_row, live, E)
            for c in range(0, E, COLUMNS):
                dy, u = incoming(x, MATRIX, GIVEN, INVERSE_MASS, MASS_WEIGHTS, MASS_VECTOR, h, c + chunk, r, live,
                                 rescale, E, H, COLUMNS, PRECISION)  # fmt: skip
                at, real = h * E + c + chunk, c + chunk < E
                mask = within(live, c + chunk, E, COLUMNS)
                g = gradient_of_phi(dy, u, maps[0], dlogits, ROUTER_D, at, real, N_D, PRECISION)
                sums1 = map_sums(sums1, rows[0], measured[0], g, at, mask, FAST)
                if PAIR:
                    g = gradient_of_phi(dy, u, maps[1], dlogits, second, at, real, N_D, PRECISION)
                    sums2 = map_sums(sums2, rows[1], measured[1], g, at, mask, FAST)
        c1 = sums1[0]
        dgamma = gamma_gradient(sums1, measured[0][2], STATS + 2 * T, r, live, FAST)
        routed1 = slopes_times(SLOPES, DLOGITS, dgamma, r, live, inside, N_F)
        if PAIR:
            c2 = sums2[0]
            dgamma = gamma_gradient(sums2, measured[1][2], STATS + 5 * T, r, live, FAST)
            routed2 = slopes_times(SLOPES + T * N_F, DLOGITS + T * N_F, dgamma, r, live, inside, N_F)

    # Last walk: dZ, and the sums of dgamma.
    total1, total2 = zero, zero
    for h in range(0, H):
        x = None if GIVEN is not None else load_operand(X, h, image, n, x_batch, x_row, live, E)
        for c in range(0, E, COLUMNS):
            dy, u = incoming(x, MATRIX, GIVEN, INVERSE_MASS, MASS_WEIGHTS, MASS_VECTOR, h, c + chunk, r, live, rescale,
                             E, H, COLUMNS, PRECISION)  # fmt: skip
            at, real = h * E + c + chunk, c + chunk < E
            g = gradient_of_phi(dy, u, maps[0], dlogits, ROUTER_D, at, real, N_D, PRECISION)
            total1 = store_gradient(DZ1, total1, rows[0], measured[0], c1, STATS + 2 * T, g, routed1, ROUTER1, r, at,
                                    real, inside, live, D, N_F, FAST, PRECISION)  # fmt: skip
            if PAIR:
                g = gradient_of_phi(dy, u, maps[1], dlogits, second, at, real, N_D, PRECISION)
                total2 = store_gradient(DZ2, total2, rows[1], measured[1], c2, STATS + 5 * T, g, routed2, ROUTER2, r,
                                        at, real, inside, live, D, N_F, FAST, PRECISION)  # fmt: skip
    dgamma = chosen_sum(measured[0][2] * LN2 * total1, INDEX, r, live, N_F)
    if PAIR:
        dgamma += chosen_sum(measured[1][2] * LN2 * total2, INDEX + T, r, live, N_F)
    store_table(DGAMMA, dgamma, N_F)

    if DX is not None:
        write_readout(DX, maps, MATRIX, None, None, GRAD, MASK, WEIGHT, None, GRIDS, image, segment, n, r, inside, live,
                      rescale, grad_batch, grad_row, grid_start, grid_rows, grid_columns, N, D, H, ADD, True,
                      COLUMNS, FAST, PRECISION)  # fmt: skip


class Incoming(NamedTuple):
    """Where the gradient of Zh comes from: x (B, N, d) and matrix (segments, H, e, e), or ``given`` (B, N, d).

    Of the mass inverse_mass and weights (T, H), vector (segments, d), all float32 or None.
    """

    x: Tensor | None = None
    matrix: Tensor | None = None
    given: Tensor | None = None
    inverse_mass: Tensor | None = None
    mass_weights: Tensor | None = None
    mass_vector: Tensor | None = None

    def arguments(self, call: Call) -> dict[str, Any]:
        return {
            "X": self.x, "MATRIX": self.matrix, "GIVEN": self.given, "INVERSE_MASS": self.inverse_mass,
            "x_batch": 0 if self.x is None else self.x.stride(0), "x_row": 0 if self.x is None else self.x.stride(1),
            # A product of torch's is already in scale, but for what float16 was scaled down by.
            "rescale": call.rescale if self.given is None else 1.0 / call.unit,
        }  # fmt: skip


class TableGradients(NamedTuple):
    """float32: of gamma (n_F,), of lambda (n_D,), and straight through of the logits (maps, T, n_F) and (T, n_D)."""

    gamma: Tensor
    lam: Tensor | None
    logits: Tensor | None
    differential_logits: Tensor | None


def stage_of(source: Incoming, side: Side) -> str:
    """The name of the launch configuration."""
    if side.slopes is not None:
        return "routed_gradients"
    return "gradients" if source.given is None else "given_gradients"


def mass_gradient(call: Call, side: Side, source: Incoming) -> Tensor:
    """(T, H) float32, see :func:`mass_gradient_kernel`."""
    config, constants = configs.pick(stage_of(source, side), call.dtype, call.head_dim), numerics(call.dtype)
    out = torch.empty(call.rows, call.heads, device=call.device, dtype=torch.float32)
    launch(
        mass_gradient_kernel, (call.programs(config.rows),), config, **call.arguments(side), **source.arguments(call),
        TILES=call.tiles(config.rows), OUT=out, ROWS=config.rows, COLUMNS=config.columns, FAST=constants["FAST"],
        PRECISION=constants["PRECISION"],
    )  # fmt: skip
    return out


def gradients(
    call: Call,
    side: Side,
    source: Incoming,
    dz: Tensor,
    dz_redundant: Tensor | None,
    *,
    dx: Tensor | None = None,
    add: bool = False,
    grad: Tensor | None = None,
    weight: Tensor | None = None,
    differential_logits: Tensor | None = None,
) -> TableGradients:
    """Writes the gradients of the tokens to ``dz`` and ``dz_redundant`` (B, N, d), contiguous, and returns the others.

    ``dx``, ``grad`` and ``weight`` (9, d) are DX, GRAD and WEIGHT of :func:`gradients_kernel`, ``add`` its ADD;
    ``differential_logits`` (T, n_D) those of the lambda router where another call of this function has found them.
    """
    config, constants = configs.pick(stage_of(source, side), call.dtype, call.head_dim), numerics(call.dtype)
    programs, convolution = call.programs(config.rows), call.convolution(grad, weight)
    sizes = call.choices()

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, device=call.device, dtype=torch.float32)

    dgamma = new(programs, sizes["N_F"])
    dlam = None if side.choice is None else new(programs, sizes["N_D"])
    dlogits = None if side.slopes is None else torch.empty_like(side.slopes)
    if side.differential_slopes is not None:
        differential_logits = torch.empty_like(side.differential_slopes)
    launch(
        gradients_kernel, (programs,), config, **call.arguments(side), **source.arguments(call), **sizes,
        MASS_WEIGHTS=source.mass_weights, MASS_VECTOR=source.mass_vector, DZ1=dz, DZ2=dz_redundant, DX=dx,
        MASK=call.mask if convolution["WEIGHT"] is not None else None, ROUTER1=side.routers[0], ROUTER2=side.routers[1],
        ROUTER_D=side.differential_router, SLOPES=side.slopes, SLOPES_D=side.differential_slopes, DLOGITS=dlogits,
        DLOGITS_D=differential_logits, DGAMMA=dgamma, DLAM=dlam, FACTORS=side.factors, TILES=call.tiles(config.rows),
        GRAD=grad, **convolution, unit=call.unit, grad_batch=0 if grad is None else grad.stride(0),
        grad_row=0 if grad is None else grad.stride(1), RELATIVE=side.relative, ADD=add, ROWS=config.rows,
        COLUMNS=config.columns, FAST=constants["FAST"], PRECISION=constants["PRECISION"],
    )  # fmt: skip
    return TableGradients(dgamma.sum(0), None if dlam is None else dlam.sum(0), dlogits, differential_logits)
