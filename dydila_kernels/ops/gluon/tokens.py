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

from dydila_kernels.ops.arguments import Denominator
from dydila_kernels.ops.context import LaunchContext, QKOperand
from dydila_kernels.ops.gluon.common import inverse_of, place_of, row_scale_of
from dydila_kernels.ops.gluon.routers import octets, octets_summed, prepared, tokens_config, whole
from dydila_kernels.ops.gluon.rows import (
    R,
    as_left,
    bits,
    choose,
    fold,
    largest,
    load,
    numbers_gathered,
    numbers_of_rows,
    of_both,
    pointers,
    products,
    row,
    rows_there,
    share,
    share_logits,
    shared_logits,
    shared_numbers,
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
from dydila_kernels.ops.tiles import TINY, launch, part_width, product


@gluon.constexpr_function
def router_layout(warps):
    """(W, 256) elements of an octet of a prepared router: 16 bytes a lane, of its own channels in each warp."""
    elements, across = [[0, 1], [0, 2], [0, 4]], [[1 << i, 0] for i in bits(warps)]
    lanes = [[0, 8], [0, 16], [0, 32], [0, 64], [0, 128]]
    return gl.DistributedLinearLayout(elements, lanes, across, [], [warps, 256])


@gluon.jit
def route(words, rest, router, c: gl.constexpr, logits, dtype: gl.constexpr, N: gl.constexpr, PARTS: gl.constexpr,
          WARPS: gl.constexpr):  # fmt: skip
    """Octets of logits (W, R, 8) + of each warp the words of chunk c times a router (d / 32, octets, 8, 32), and what
    these lack times its largest part, where given."""
    OCTETS: gl.constexpr = octets(N, PARTS)
    WHOLE: gl.constexpr = whole(N, PARTS)
    layout: gl.constexpr = router_layout(WARPS)
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, layout))[:, None]
    at = warp * (OCTETS * 256) + gl.arange(0, 256, layout=gl.SliceLayout(0, layout))[None, :]
    z = as_left(words, dtype, WARPS)
    found = ()
    for i in gl.static_range(octets_summed(N, PARTS)):
        total = logits[i]
        for part in gl.static_range(0 if i < WHOLE else PARTS - 1, PARTS):
            x = gl.load(router + (c * WARPS * OCTETS + part * WHOLE + i) * 256 + at)
            x = gl.reshape(gl.permute(gl.reshape(x, (WARPS, 8, 4, 2, 2, 2)), (0, 3, 4, 2, 5, 1)), (WARPS, 32, 8))
            x = gl.convert_layout(x, gl.DotOperandLayout(1, products(WARPS), 2), assert_trivial=True)
            total = mma_v2(z, x, total)
            if rest is not None and part == PARTS - 1:
                total = mma_v2(as_left(rest, dtype, WARPS), x, total)
        found = found + (total,)  # noqa: RUF005  Triton knows no stars
    return found


@gluon.jit
def no_logits(N: gl.constexpr, PARTS: gl.constexpr, WARPS: gl.constexpr):
    """Octets of zeros (W, R, 8)."""
    found = ()
    for _ in gl.static_range(octets_summed(N, PARTS)):
        found = found + (gl.zeros([WARPS, R, 8], gl.float32, products(WARPS)),)  # noqa: RUF005
    return found


@gluon.jit
def renorm_of(m, squares, powers):
    """m |s| / |p| (R,) and |p|^2, both 0 without a positive entry; a maximum passes over NaN, a row shall not."""
    nonzero = (m >= TINY) | (powers != powers)
    ratio = squares / gl.where(nonzero, powers, 1.0)
    return gl.where(nonzero, m * gl.sqrt(ratio), 0.0), gl.where(nonzero, powers, 0.0)


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
def routed(words, router, most_in, branch: gl.constexpr, k, PARTS: gl.constexpr, dtype: gl.constexpr,
           WARPS: gl.constexpr):  # fmt: skip
    """Octets of logits of what each warp has of a branch, as words; shares its largest entries."""
    logits = no_logits(k.N_F, PARTS, WARPS)
    most = largest(words[0], dtype, WARPS)
    for c in gl.static_range(len(words)):
        logits = route(words[c], None, router, c, logits, dtype, k.N_F, PARTS, WARPS)
        if c > 0:
            most = larger(most, largest(words[c], dtype, WARPS), dtype)
    share(most_in, lane_largest(most, dtype, WARPS), branch)
    return logits


@gluon.jit
def measure(words, router, inv_max, gamma, squares_in, norms_in, branch: gl.constexpr, k, dtype: gl.constexpr,
            TERMS: gl.constexpr, STASH: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
    """Of the words of a branch: those of the powers, as :func:`scaled` takes them, in shared memory where STASH, and
    octets of what each warp has of their product with a router; shares what it has of the squares of s and of p."""
    dots = no_logits(k.N_D, 2, WARPS)
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
    share(squares_in, lane_sums(squares, WARPS), branch)
    share(norms_in, lane_sums(norms, WARPS), branch)
    return kept, dots


@gluon.jit
def keep(statistic, x, place, stride):
    """Stores x (R,), or (2 R,) of both branches, of the tokens of a tile in their places of a statistic (T,), that of
    the second branch so much further."""
    rows = gl.arange(0, x.shape[0], layout=x.type.layout)
    at = place.token + rows % R + (rows // R) * stride
    gl.store(statistic + at, x, mask=place.first + rows % R < place.end)


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
    parts = shared_numbers(WARPS)
    share(parts, lane_sums(dots, WARPS), 0)
    inverse = inverse_of(gl.sum(parts.slice(0, R, 0).load(numbers_of_rows(WARPS)), 1))
    inverse = gl.convert_layout(inverse, row(WARPS), assert_trivial=True)
    keep(denominator.inverse, inverse, place, 0)
    return inverse[:, None]


@gluon.jit
def tokens_tile(z, y, tables, routers, stats, scaling, denominator, out, place, there, k, WARPS: gl.constexpr,
                MASKED: gl.constexpr, dtype: gl.constexpr):  # fmt: skip
    """What :func:`gluon_tokens_kernel` does with the words z, y of both branches."""
    CHUNKS: gl.constexpr = len(z)
    PARTS: gl.constexpr = 3 if dtype == gl.bfloat16 else 2
    logits, most = shared_logits(octets_summed(k.N_F, PARTS), WARPS), shared_numbers(WARPS)
    share_logits(logits, routed(z, routers.kernel, most, 0, k, PARTS, dtype, WARPS), 0)
    other = routers.kernel + CHUNKS * WARPS * 256 * octets(k.N_F, PARTS)
    share_logits(logits, routed(y, other, most, 1, k, PARTS, dtype, WARPS), 1)

    # Here a lane has a token of a branch and some options.
    index, gamma = choose(summed_logits(logits, k.N_F, PARTS), tables.gamma, k.N_F)
    column: gl.constexpr = index.type.layout
    m = gl.convert_layout(gl.max(most.load(numbers_gathered(WARPS)), 1), column, assert_trivial=True)
    inv_max = inverse_of(m)
    gamma, inverses = spread(gamma), spread(inv_max)
    keep(stats.index, index.to(gl.int8), place, place.T)
    keep(stats.norms, inv_max, place, 3 * place.T)
    gamma, other_gamma = of_both(gamma, WARPS)
    inv_max, other_inv = of_both(inverses, WARPS)

    # Denominator terms take registers, and so do many channels, or masks beside logits of many choices: powers of the
    # first branch wait in shared memory.  Of many channels and choices there is one program, which has registers.
    TERMS: gl.constexpr = denominator.sums is not None or denominator.inverse is not None
    MANY: gl.constexpr = k.N_F > 16 or k.N_D > 16
    STASH: gl.constexpr = TERMS or (CHUNKS > 3 and not MANY) or (CHUNKS <= 3 and MANY and MASKED)
    dots, squares, norms = shared_logits(octets_summed(k.N_D, 2), WARPS), shared_numbers(WARPS), shared_numbers(WARPS)
    kept, found = measure(z, routers.differential, inv_max, gamma, squares, norms, 0, k, dtype, TERMS, STASH, WARPS)
    share_logits(dots, found, 0)
    other = routers.differential + CHUNKS * WARPS * 256 * octets(k.N_D, 2)
    other_kept, found = measure(y, other, other_inv, other_gamma, squares, norms, 1, k, dtype, TERMS, False, WARPS)

    share_logits(dots, found, 1)
    dots = summed_logits(dots, k.N_D, 2)
    squares, norms = gl.sum(squares.load(numbers_gathered(WARPS)), 1), gl.sum(norms.load(numbers_gathered(WARPS)), 1)
    renorm, norm = renorm_of(m, gl.convert_layout(squares, column, assert_trivial=True),
                             gl.convert_layout(norms, column, assert_trivial=True))  # fmt: skip
    renorms = spread(renorm)
    keep(stats.norms + place.T, renorm, place, 3 * place.T)
    keep(stats.norms + 2 * place.T, norm, place, 3 * place.T)
    weights = gl.convert_layout(renorm, gl.SliceLayout(1, dots.type.layout), assert_trivial=True)
    dots = gl.reshape(product(dots, weights[:, None]), (2, R, dots.shape[1]))
    choice, lam = choose(gl.sum(dots, 0), tables.lam, k.N_D)
    lam = spread(lam)
    keep(stats.lam_index, choice.to(gl.int8), place, 0)
    if out is not None:
        renorm, other_renorm = of_both(renorms, WARPS)
        lam = lam.load(row(WARPS))
        scale = row_scale_of(renorm, other_renorm, -lam, scaling, place, k)
        weight, other_weight = (renorm * scale)[:, None], (-lam * other_renorm * scale)[:, None]
        if denominator.inverse is not None:
            inverse = inverse_of_one_head(kept, other_kept, weight, other_weight, denominator, place, k, dtype, WARPS)
            weight, other_weight = weight * inverse, other_weight * inverse
        at = word_pointers(out, place.token * k.D, k.D, WARPS)
        for c in gl.static_range(CHUNKS):
            low, high = scaled(words_kept(kept[c], STASH, WARPS), weight, dtype, TERMS)
            other_low, other_high = scaled(other_kept[c], other_weight, dtype, TERMS)
            found = operands(low + other_low, high + other_high, out.dtype.element_ty)
            store(at + c * 16 * WARPS, found, there, c, k.D, WARPS, MASKED)
            if denominator.sums is not None:
                low, high = low + gl.abs(other_low), high + gl.abs(other_high)
                if denominator.vector is None:
                    sums_of = denominator.sums + gl.program_id(0).to(gl.int64) * k.D
                    store_sums(sums_of, low, high, c, k.D, WARPS)
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
    config, rows = tokens_config(context), R.value
    routers = side.prepared or prepared(context, [side])[0].prepared
    programs, found = context.programs(rows), None
    if sums:
        found = torch.empty(programs, context.dim, device=context.device, dtype=torch.float32)
    elif means is not None and inverse is None:
        parts = context.dim // part_width(context.head_dim)
        found = torch.empty(parts, context.num_tokens, device=context.device, dtype=torch.float32)
    ragged = context.mask is not None or context.bounds is not None or context.length % rows != 0
    launch(
        gluon_tokens_kernel, (programs,), config, tokens=context.tokens(side, masked=True),
        segments=context.tiles(rows), **context.measured(side), routers=routers, scaling=context.scaling(side),
        denominator=Denominator(means, inverse, sums=found), out=out,
        k=context.constants(config, side.has_denominator), MASKED=ragged,
    )  # fmt: skip
    return context.mean_of(found, rows) if sums and found is not None else found
