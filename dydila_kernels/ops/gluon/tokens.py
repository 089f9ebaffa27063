"""Eqs. 5-8 with tokens held in registers: what :mod:`dydila_kernels.ops.tokens` does, with the same results.

A program reads its R tokens once and makes each power once:

    route      logits of both branches and their largest entries        the warps add up; gamma and 1/m are chosen
    measure    p = s^gamma in float16, kept; |s|^2, |p|^2, p R_D        the warps add up; renorm and lambda are chosen
    write      Zh = renorm p - lambda renorm' p'

Between them the W warps, each with its share of the channels, exchange a few numbers of each token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from dydila_kernels.ops import configs
from dydila_kernels.ops.arguments import Denominator
from dydila_kernels.ops.context import LaunchContext, QKOperand
from dydila_kernels.ops.forms import choices
from dydila_kernels.ops.gluon.common import inverse_of, place_of, row_scale_of
from dydila_kernels.ops.gluon.routers import prepared
from dydila_kernels.ops.gluon.rows import (
    R,
    as_right,
    bits,
    choose,
    fold,
    largest,
    load,
    numbers_of_logits,
    numbers_of_rows,
    pointers,
    products,
    row,
    rows_there,
    share,
    share_logits,
    spread,
    stashed,
    store,
    summed_logits,
    word_pointers,
    words_kept,
    words_of,
)
from dydila_kernels.ops.gluon.terms import dots_of, store_parts, store_sums
from dydila_kernels.ops.gluon.words import larger, measured, operands, rectified, scaled
from dydila_kernels.ops.tiles import TINY, launch, padded, part_width


@gluon.constexpr_function
def router_layout(options, warps):
    """(W, options 32) elements of a prepared router: 16 bytes a lane, of its own channels in each warp."""
    tiles = [[0, 512 << i] for i in range((options // 16).bit_length() - 1)]
    lanes = [[0, 8], [0, 16], [0, 32], [0, 64], [0, 128]]
    across = [[1 << i, 0] for i in bits(warps)]
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 256], *tiles], lanes, across, [], [warps, options * 32]
    )


@gluon.jit
def route(words, rest, router, c: gl.constexpr, logits, dtype: gl.constexpr, N: gl.constexpr, PARTS: gl.constexpr,
          WARPS: gl.constexpr):  # fmt: skip
    """logits (W, n, R) + of each warp the parts of a router (d / 32, PARTS, 32 n) times the words of chunk c, and the
    largest part times what these lack, where given."""
    SIZE: gl.constexpr = padded(N) * 32
    layout: gl.constexpr = router_layout(padded(N), WARPS)
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, layout))[:, None]
    at = warp * (PARTS * SIZE) + gl.arange(0, SIZE, layout=gl.SliceLayout(0, layout))[None, :]
    z = as_right(words, dtype, WARPS)
    for part in gl.static_range(PARTS):
        x = gl.load(router + (c * WARPS * PARTS + part) * SIZE + at)
        x = gl.reshape(x, (WARPS, padded(N) // 16, 2, 8, 4, 2, 2, 2))
        x = gl.reshape(gl.permute(x, (0, 1, 6, 3, 2, 5, 4, 7)), (WARPS, padded(N), 32))
        x = gl.convert_layout(x, gl.DotOperandLayout(0, products(WARPS), 2), assert_trivial=True)
        logits = mma_v2(x, z, logits)
        if part == PARTS - 1 and rest is not None:
            logits = mma_v2(x, as_right(rest, dtype, WARPS), logits)
    return logits


@gluon.jit
def renorm_of(m, squares, powers):
    """m |s| / |p| (R,) and |p|^2, both 0 without a positive entry; a maximum passes over NaN, a row shall not."""
    nonzero = (m >= TINY) | (powers != powers)
    ratio = squares / gl.where(nonzero, powers, 1.0)
    return gl.where(nonzero, m * gl.sqrt(ratio), 0.0), gl.where(nonzero, powers, 0.0)


@gluon.jit
def as_row(x, WARPS: gl.constexpr):
    """(R,) in the layout of rows."""
    return gl.convert_layout(x, row(WARPS))


@gluon.jit
def lane_sums(x, WARPS: gl.constexpr):
    """(R, 4 W) -> (R, W)."""
    return gl.sum(gl.reshape(x, (R, WARPS, 4)), 2)


@gluon.jit
def lane_largest(most, dtype: gl.constexpr, WARPS: gl.constexpr):
    """(R, 4 W) words of :func:`largest` -> (R, W), 0 where nothing is positive."""
    low, high = rectified(most, dtype)
    return gl.max(gl.reshape(gl.maximum(low, high), (R, WARPS, 4)), 2)


@gluon.jit
def routed(words, router, k, PARTS: gl.constexpr, dtype: gl.constexpr, WARPS: gl.constexpr):
    """Of what each warp has of a branch, as words: its logits and largest entries (R, W), shared."""
    logits = gl.zeros([WARPS, padded(k.N_F), R], gl.float32, products(WARPS))
    most = largest(words[0], dtype, WARPS)
    for c in gl.static_range(len(words)):
        logits = route(words[c], None, router, c, logits, dtype, k.N_F, PARTS, WARPS)
        if c > 0:
            most = larger(most, largest(words[c], dtype, WARPS), dtype)
    return share_logits(logits, WARPS), share(lane_largest(most, dtype, WARPS), WARPS)


@gluon.jit
def measure(words, router, inv_max, gamma, k, dtype: gl.constexpr, TERMS: gl.constexpr, STASH: gl.constexpr,
            WARPS: gl.constexpr):  # fmt: skip
    """Of the words of a branch: those of the powers, as :func:`scaled` takes them, in shared memory where STASH; and
    shared, what each warp has of their product with a router and of the squares of s and of p."""
    dots = gl.zeros([WARPS, padded(k.N_D), R], gl.float32, products(WARPS))
    squares = fold(gl.zeros([R, 16 * WARPS], gl.float32, words_of(WARPS)), WARPS)
    norms = squares
    kept = ()
    for c in gl.static_range(len(words)):
        square, norm, half, rest, again = measured(words[c], inv_max[:, None], gamma[:, None], dtype, TERMS)
        squares += fold(square, WARPS)
        norms += fold(norm, WARPS)
        kept += (stashed(again, WARPS) if STASH else again,)
        if dtype == gl.bfloat16:
            rest = None  # float16 is more exact than the tokens
        dots = route(half, rest, router, c, dots, gl.float16, k.N_D, 2, WARPS)
    squares, norms = share(lane_sums(squares, WARPS), WARPS), share(lane_sums(norms, WARPS), WARPS)
    return kept, share_logits(dots, WARPS), squares, norms


@gluon.jit
def norms_of(most, squares, norms, layout: gl.constexpr, WARPS: gl.constexpr):
    """:func:`renorm_of` from what the warps share of m, |s|^2 and |p|^2."""
    m = gl.convert_layout(gl.max(most.load(numbers_of_logits(WARPS)), 1), layout)
    squares = gl.convert_layout(gl.sum(squares.load(numbers_of_logits(WARPS)), 1), layout)
    return renorm_of(m, squares, gl.convert_layout(gl.sum(norms.load(numbers_of_logits(WARPS)), 1), layout))


@gluon.jit
def keep(statistic, x, place):
    """Stores x (R,) of the tokens of a tile in their places of a statistic (T,)."""
    rows = gl.arange(0, R, layout=x.type.layout)
    gl.store(statistic + place.token + rows, x, mask=place.first + rows < place.end)


@gluon.jit
def inverse_of_one_head(kept, other_kept, weight, other_weight, denominator, place, k, dtype: gl.constexpr,
                        WARPS: gl.constexpr):  # fmt: skip
    """(R, 1): 1 / (the denominator terms of all channels . denominator.vector), saved in denominator.inverse."""
    dots = fold(gl.zeros([R, 16 * WARPS], gl.float32, words_of(WARPS)), WARPS)
    for c in gl.static_range(len(kept)):
        low, high = scaled(words_kept(kept[c], True, WARPS), weight, dtype, True)
        other_low, other_high = scaled(other_kept[c], other_weight, dtype, True)
        low, high = low + gl.abs(other_low), high + gl.abs(other_high)
        dots += dots_of(low, high, denominator.vector + place.segment * k.D, c, k.D, WARPS)
    parts = share(lane_sums(dots, WARPS), WARPS)
    inverse = inverse_of(as_row(gl.sum(parts.load(numbers_of_logits(WARPS)), 1), WARPS))
    keep(denominator.inverse, inverse, place)
    return inverse[:, None]


@gluon.jit
def tokens_tile(z, y, tables, routers, stats, scaling, denominator, out, place, there, k, WARPS: gl.constexpr,
                MASKED: gl.constexpr, dtype: gl.constexpr):  # fmt: skip
    """What :func:`gluon_tokens_kernel` does with the words z, y of both branches."""
    CHUNKS: gl.constexpr = len(z)
    PARTS: gl.constexpr = 3 if dtype == gl.bfloat16 else 2
    logits, most = routed(z, routers.kernel, k, PARTS, dtype, WARPS)
    other = routers.kernel + CHUNKS * WARPS * 32 * PARTS * padded(k.N_F)
    other, other_most = routed(y, other, k, PARTS, dtype, WARPS)
    index, gamma = choose(summed_logits(logits, WARPS), tables.gamma, k.N_F)
    other_index, other_gamma = choose(summed_logits(other, WARPS), tables.gamma, k.N_F)
    gamma, other_gamma = spread(gamma, WARPS), spread(other_gamma, WARPS)
    inv_max = inverse_of(as_row(gl.max(most.load(numbers_of_rows(WARPS)), 1), WARPS))
    gamma = gamma.load(row(WARPS))

    keep(stats.index, index.to(gl.int8), place)
    keep(stats.index + place.T, other_index.to(gl.int8), place)
    keep(stats.norms, inv_max, place)

    # Denominator terms take registers: those of the first branch wait in shared memory.
    TERMS: gl.constexpr = denominator.sums is not None or denominator.inverse is not None
    kept, dots, squares, norms = measure(z, routers.differential, inv_max, gamma, k, dtype, TERMS, TERMS, WARPS)
    other_inv = inverse_of(as_row(gl.max(other_most.load(numbers_of_rows(WARPS)), 1), WARPS))
    other_gamma = other_gamma.load(row(WARPS))
    keep(stats.norms + 3 * place.T, other_inv, place)
    other = routers.differential + CHUNKS * WARPS * 32 * 2 * padded(k.N_D)
    other_kept, other, other_squares, other_norms = measure(
        y, other, other_inv, other_gamma, k, dtype, TERMS, False, WARPS
    )
    dots, other = summed_logits(dots, WARPS), summed_logits(other, WARPS)
    column: gl.constexpr = gl.SliceLayout(1, dots.type.layout)
    renorm, norm = norms_of(most, squares, norms, column, WARPS)
    other_renorm, other_norm = norms_of(other_most, other_squares, other_norms, column, WARPS)
    choice, lam = choose(dots * renorm[:, None] + other * other_renorm[:, None], tables.lam, k.N_D)

    keep(stats.norms + place.T, renorm, place)
    keep(stats.norms + 2 * place.T, norm, place)
    keep(stats.norms + 4 * place.T, other_renorm, place)
    keep(stats.norms + 5 * place.T, other_norm, place)
    keep(stats.lam_index, choice.to(gl.int8), place)
    if out is not None:
        scale = row_scale_of(renorm, other_renorm, -lam, scaling, place, k)
        weight, other_weight = spread(renorm * scale, WARPS), spread(-lam * other_renorm * scale, WARPS)
        weight, other_weight = weight.load(row(WARPS))[:, None], other_weight.load(row(WARPS))[:, None]
        if denominator.inverse is not None:
            inverse = inverse_of_one_head(kept, other_kept, weight, other_weight, denominator, place, k, dtype, WARPS)
            weight, other_weight = weight * inverse, other_weight * inverse
        at = word_pointers(out, place.token * k.D, k.D, WARPS)
        for c in gl.static_range(CHUNKS):
            low, high = scaled(words_kept(kept[c], TERMS, WARPS), weight, dtype, TERMS)
            other_low, other_high = scaled(other_kept[c], other_weight, dtype, TERMS)
            found = operands(low + other_low, high + other_high, out.dtype.element_ty)
            store(at + c * 16 * WARPS, found, there, c, k.D, WARPS, MASKED)
            if denominator.sums is not None:
                low, high = low + gl.abs(other_low), high + gl.abs(other_high)
                if denominator.vector is None:
                    sums = denominator.sums + gl.program_id(0).to(gl.int64) * k.D
                    store_sums(sums, low, high, c, k.D, WARPS)
                else:
                    dots = dots_of(low, high, denominator.vector + place.segment * k.D, c, k.D, WARPS)
                    store_parts(denominator.sums, dots, place, c, k, WARPS)


@gluon.jit
def gluon_tokens_kernel(tokens, segments, tables, routers, stats, scaling, denominator, out, k: gl.constexpr,
                        MASKED: gl.constexpr):  # fmt: skip
    """One program for a tile of R tokens: routes and measures them, then writes Zh to out (T, d), or None.

    routers are :class:`PreparedRouters`, the other arguments as in :mod:`dydila_kernels.ops.arguments`; MASKED: a tile
    may have rows that do not count.  With denominator.inverse, of one head, Zh is over the denominator.
    """
    WARPS: gl.constexpr = gl.num_warps()
    CHUNKS: gl.constexpr = (k.D + 32 * WARPS - 1) // (32 * WARPS)
    place = place_of(segments, R)
    there, active = rows_there(tokens.mask, place, WARPS)
    z_pointers, y_pointers = pointers(tokens.z, place, WARPS), pointers(tokens.redundant, place, WARPS)
    z = ()
    y = ()
    for c in gl.static_range(CHUNKS):
        z = z + (load(z_pointers + c * 16 * WARPS, active, c, k.D, WARPS, MASKED),)  # noqa: RUF005  Triton knows no stars
    for c in gl.static_range(CHUNKS):
        y = y + (load(y_pointers + c * 16 * WARPS, active, c, k.D, WARPS, MASKED),)  # noqa: RUF005
    dtype: gl.constexpr = tokens.z.x.dtype.element_ty
    tokens_tile(z, y, tables, routers, stats, scaling, denominator, out, place, there, k, WARPS, MASKED, dtype)


def tokens(
    context: LaunchContext,
    side: QKOperand,
    out: Tensor | None,
    *,
    sums: bool = False,
    means: Tensor | None = None,
    inverse: Tensor | None = None,
) -> Tensor | None:
    """Routes and measures one side, and writes Zh to ``out`` (B, N, d) contiguous, in its dtype, where given.

    Under "denominator", with ``sums``, of keys: returns the mean denominator term (segments, d) float32.  With
    ``means``, those of the keys, of queries: of one head divides Qh where ``inverse`` (T, 1) is given, and writes that;
    else returns the denominators in parts (d / width, T) float32, see :func:`part_width`.
    """
    stage = "gluon_tokens" if choices(context) <= 16 else "gluon_tokens_of_many"
    config = configs.pick(stage, context.dtype, context.dim)
    rows = R.value
    programs, found = context.programs(rows), None
    if sums:
        found = torch.empty(programs, context.dim, device=context.device, dtype=torch.float32)
    elif means is not None and inverse is None:
        parts = context.dim // part_width(context.head_dim)
        found = torch.empty(parts, context.num_tokens, device=context.device, dtype=torch.float32)
    ragged = context.mask is not None or context.bounds is not None or context.length % rows != 0
    launch(
        gluon_tokens_kernel, (programs,), config, tokens=context.tokens(side, masked=True),
        segments=context.tiles(rows), **context.measured(side),
        routers=prepared(context, side, config.warps), scaling=context.scaling(side),
        denominator=Denominator(means, inverse, sums=found), out=out,
        k=context.constants(config, side.has_denominator), MASKED=ragged,
    )  # fmt: skip
    return context.mean_of(found, rows) if sums and found is not None else found
