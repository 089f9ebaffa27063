"""What the Gluon kernels of tokens share: which thread holds what, operands, sums over rows.

A program has R = 16 tokens, whole, in registers: its W warps share the channels, a chunk of 32 W at a time, of which
warp w has 32.  Lane l has of these, of the tokens l / 4 and l / 4 + 8, eight channels from 8 (l mod 4) on: 16 bytes,
four words of two channels (:func:`words_of`).  Products on tensor cores may take the channels of a sum in any order, so
the words are operands as they are: :func:`as_left` moves nothing but registers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dydila_kernels.ops.gluon.routers import spare, whole
from dydila_kernels.ops.gluon.words import larger_bf16, larger_fp16
from dydila_kernels.ops.tiles import padded

R = gl.constexpr(16)
"""Tokens of a program: the rows of a product of tensor cores."""


@gluon.constexpr_function
def bits(warps):
    """Those of the number of a warp."""
    return range(warps.bit_length() - 1)


@gluon.constexpr_function
def products(warps):
    """(W, R, 8): results of products on tensor cores, one for each warp."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def words_of(warps):
    """(R, 16 W): words of a chunk of channels."""
    across = [[0, 16 << i] for i in bits(warps)]
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [8, 0]], lanes, across, [], [16, 16 * warps])


@gluon.constexpr_function
def row(warps):
    """(R,): what is known of tokens."""
    return gl.SliceLayout(1, words_of(warps))


@gluon.jit
def channels(words, dtype: gl.constexpr):
    """(R, 16 W) words -> (..., 2): both channels of each."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    return gl.join(low, high).to(dtype, bitcast=True)


@gluon.jit
def as_left(words, dtype: gl.constexpr, WARPS: gl.constexpr):
    """Words (R, 16 W) as left operand (W, R, 32)."""
    x = gl.reshape(channels(words, dtype), (2, 8, WARPS, 4, 2, 2, 2))
    x = gl.reshape(gl.permute(x, (2, 0, 1, 4, 5, 3, 6)), (WARPS, R, 32))
    return gl.convert_layout(x, gl.DotOperandLayout(0, products(WARPS), 2), assert_trivial=True)


@gluon.jit
def word_pointers(x, start, stride, WARPS: gl.constexpr):
    """Pointers (R, 16 W) to the first words of rows of x, in any of three dtypes; ``start`` and ``stride`` even."""
    rows = gl.arange(0, R, layout=row(WARPS)).to(gl.int64) * (stride // 2)
    columns = gl.arange(0, 16 * WARPS, layout=gl.SliceLayout(0, words_of(WARPS)))
    offsets = rows[:, None] + columns[None, :]
    if x.dtype.element_ty == gl.float32:
        return (x + start).to(gl.pointer_type(gl.int64)) + offsets
    else:
        return (x + start).to(gl.pointer_type(gl.int32)) + offsets


@gluon.jit
def pointers(strided, place, WARPS: gl.constexpr):
    """To the rows of a tile."""
    start = place.image * strided.stride_xb + place.first.to(gl.int64) * strided.stride_xn
    return word_pointers(strided.x, start, strided.stride_xn, WARPS)


@gluon.jit
def rows_there(mask, place, WARPS: gl.constexpr):
    """(R,): which rows of a tile there are, and which of them count, by ``mask`` (T,) or None."""
    rows = gl.arange(0, R, layout=row(WARPS))
    there = place.first + rows < place.end
    if mask is None:
        return there, there
    else:
        return there, there & (gl.load(mask + place.token + rows, mask=there, other=0) != 0)


@gluon.jit
def inside(rows, c: gl.constexpr, D: gl.constexpr, WARPS: gl.constexpr, MASKED: gl.constexpr):
    """The mask of chunk c: the channels there are, and where MASKED the rows (R,) given."""
    WIDTH: gl.constexpr = 16 * WARPS
    if (c + 1) * WIDTH * 2 <= D:
        return rows[:, None]
    else:
        columns = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, words_of(WARPS)))[None, :]
        there = c * WIDTH + columns < D // 2
        if MASKED:
            return there & rows[:, None]
        else:
            return there


@gluon.jit
def load(pointers, rows, c: gl.constexpr, D: gl.constexpr, WARPS: gl.constexpr, MASKED: gl.constexpr):
    """Words of chunk c; zeros outside, see :func:`inside`."""
    if MASKED or (c + 1) * WARPS * 32 > D:
        return gl.load(pointers, mask=inside(rows, c, D, WARPS, MASKED), other=0)
    else:
        return gl.load(pointers)


@gluon.jit
def store(pointers, words, rows, c: gl.constexpr, D: gl.constexpr, WARPS: gl.constexpr, MASKED: gl.constexpr):
    """Words of chunk c, see :func:`inside`."""
    if MASKED or (c + 1) * WARPS * 32 > D:
        gl.store(pointers, words, mask=inside(rows, c, D, WARPS, MASKED))
    else:
        gl.store(pointers, words)


@gluon.jit
def largest(words, dtype: gl.constexpr, WARPS: gl.constexpr):
    """(R, 16 W) -> (R, 4 W): of what a lane has of each row, the largest of either channel of the words."""
    x = gl.reshape(words, (R, 4 * WARPS, 4))
    if dtype == gl.bfloat16:
        return gl.reduce(x, 2, larger_bf16)
    else:
        return gl.reduce(x, 2, larger_fp16)


@gluon.jit
def fold(x, WARPS: gl.constexpr):
    """(R, 16 W) -> (R, 4 W): the sums of what a lane has of each row."""
    return gl.sum(gl.reshape(x, (R, 4 * WARPS, 4)), 2)


@gluon.jit
def choose(logits, table, CHOICES: gl.constexpr):
    """(R, n) -> (R,) int32, the lowest index of the largest of the first CHOICES, and what a table has there.

    Among NaN, some choice.  The table is read before the logits are known: nothing waits for it.
    """
    layout: gl.constexpr = logits.type.layout
    options = gl.arange(0, logits.shape[1], layout=gl.SliceLayout(0, layout))
    entries = gl.load(table + gl.minimum(options, CHOICES - 1)).to(gl.float32)[None, :]
    options = options[None, :]
    logits = gl.where(options < CHOICES, logits, float("-inf"))
    best = gl.max(logits, 1)
    index = gl.min(gl.where(logits == best[:, None], options, CHOICES - 1), 1)
    return index, gl.sum(gl.where(options == index[:, None], entries, 0.0), 1)


# Between the warps of a program ---------------------------------------------------------------------------------------


@gluon.constexpr_function
def columns_of(options):
    """The bits of the number of an option."""
    return [1 << i for i in bits(options)]


@gluon.constexpr_function
def logits_shared(options, warps):
    """(W, 2 R, options) of both branches in shared memory: the lanes of a warp read different banks."""
    tokens, columns = [[0, 1 << i, 0] for i in range(4)], [[0, 0, n] for n in columns_of(options)]
    across = [[1 << i, 0, 0] for i in bits(warps)]
    return gl.SharedLinearLayout([*columns[:3], tokens[0], [0, 16, 0], *tokens[1:], *columns[3:], *across])


@gluon.constexpr_function
def logits_gathered(options, warps):
    """(W, 2 R, options): the parts of a sum over the warps in one lane; a warp has a few tokens, both branches."""
    tokens, columns = [[0, 1 << i, 0] for i in range(1, 4)], [[0, 0, n] for n in columns_of(options)]
    places, n = [*tokens, *[[0, 0, 0]] * 2], len(bits(warps))
    parts = [*([1 << i, 0, 0] for i in bits(warps)), *columns[3:], *places[n:3]]
    lanes = [*columns[:3], [0, 1, 0], [0, 16, 0]]
    return gl.DistributedLinearLayout(parts, lanes, places[:n], [], [warps, 32, options])


@gluon.constexpr_function
def earlier(i, n):
    """i, or the last of n."""
    return min(i, n - 1)


@gluon.jit
def shared_logits(SUMS: gl.constexpr, WARPS: gl.constexpr):
    """Shared memory for octets of logits of both branches; their number is padded to a power of two."""
    N: gl.constexpr = padded(8 * SUMS, 8)
    return gl.allocate_shared_memory(gl.float32, [WARPS, 2 * R, N], logits_shared(N, WARPS))


@gluon.jit
def share_logits(shared, logits, branch: gl.constexpr):
    """Stores octets of logits (W, R, 8) of a branch; what pads their number are the last of them."""
    for octet in gl.static_range(shared.shape[2] // 8):
        part = shared.slice(branch * R, R, 1).slice(octet * 8, 8, 2)
        part.store(logits[earlier(octet, len(logits))])


@gluon.jit
def summed_logits(shared, N: gl.constexpr, PARTS: gl.constexpr):
    """(2 R, n) of what :func:`share_logits` shared, summed over the warps, and over the parts of the options that are
    together in the last octet."""
    WHOLE: gl.constexpr = whole(N, PARTS)
    OCTETS: gl.constexpr = shared.shape[2] // 8
    S: gl.constexpr = spare(PARTS)
    logits = gl.sum(shared.load(logits_gathered(shared.shape[2], shared.shape[0])), 0)
    if N > 8 * WHOLE:
        layout: gl.constexpr = logits.type.layout
        options = gl.arange(0, 8 * OCTETS, layout=gl.SliceLayout(0, layout))[None, :]
        options += gl.zeros([2 * R, 8 * OCTETS], gl.int32, layout)
        parts = gl.reshape(logits, (2 * R, OCTETS, 8 // S, S))
        first = gl.reshape(options, (2 * R, OCTETS, 8 // S, S)) < 8 * WHOLE
        logits = gl.where(first, parts, gl.expand_dims(gl.sum(parts, 2), 2))
        logits = gl.convert_layout(gl.reshape(logits, (2 * R, 8 * OCTETS)), layout, assert_trivial=True)
    return logits


@gluon.constexpr_function
def numbers_shared(warps):
    """(2 R, W) in shared memory."""
    return gl.SharedLinearLayout([*([1 << i, 0] for i in range(5)), *([0, 1 << i] for i in bits(warps))])


@gluon.constexpr_function
def numbers_gathered(warps):
    """(2 R, W), of the tokens that a lane has of :func:`logits_gathered`."""
    places, n = [*([1 << i, 0] for i in range(1, 4)), *[[0, 0]] * 2], len(bits(warps))
    parts = [*([0, 1 << i] for i in bits(warps)), *places[n:3]]
    lanes = [[0, 0], [0, 0], [0, 0], [1, 0], [16, 0]]
    return gl.DistributedLinearLayout(parts, lanes, places[:n], [], [32, warps])


@gluon.constexpr_function
def numbers_of_rows(warps):
    """(R, W), whose slices are numbers of rows."""
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    parts = [*([0, 1 << i] for i in bits(warps)), [8, 0]]
    return gl.DistributedLinearLayout(parts, lanes, [[0, 0] for _ in bits(warps)], [], [16, warps])


@gluon.jit
def shared_numbers(WARPS: gl.constexpr):
    """Shared memory for a number (R, W) of both branches."""
    return gl.allocate_shared_memory(gl.float32, [2 * R, WARPS], numbers_shared(WARPS))


@gluon.jit
def share(shared, x, branch: gl.constexpr):
    """Stores x (R, W) of a branch."""
    shared.slice(branch * R, R, 0).store(x)


@gluon.constexpr_function
def both_rows(warps):
    """(2 R,): what is known of tokens of both branches, see :func:`row`."""
    return gl.DistributedLinearLayout([[8], [16]], [[0], [0], [1], [2], [4]], [[0] for _ in bits(warps)], [], [32])


@gluon.jit
def spread(x):
    """Shared memory with x (R,) or (2 R,) float32, which some lanes have."""
    N: gl.constexpr = x.shape[0]
    shared = gl.allocate_shared_memory(gl.float32, [N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    shared.store(x)
    return shared


@gluon.jit
def of_both(shared, WARPS: gl.constexpr):
    """Two (R,) in the layout of rows, of (2 R,) that was spread."""
    x = shared.load(both_rows(WARPS))
    z, y = gl.split(gl.permute(gl.reshape(x, (2, R)), (1, 0)))
    z = gl.convert_layout(z, row(WARPS), assert_trivial=True)
    return z, gl.convert_layout(y, row(WARPS), assert_trivial=True)


@gluon.constexpr_function
def words_shared(warps):
    """(R, 16 W) in shared memory: 16 bytes a lane of :func:`words_of`, next to each other."""
    within = [[0, 1], [0, 2], [0, 4], [0, 8], [1, 0], [2, 0], [4, 0], [8, 0]]
    return gl.SharedLinearLayout([*within, *([0, 16 << i] for i in bits(warps))])


@gluon.jit
def stashed(words, WARPS: gl.constexpr):
    """Shared memory with words (R, 16 W), each lane's its own."""
    shared = gl.allocate_shared_memory(gl.int32, [R, 16 * WARPS], words_shared(WARPS))
    shared.store(words)
    return shared


@gluon.jit
def words_kept(kept, STASHED: gl.constexpr, WARPS: gl.constexpr):
    """Words (R, 16 W), or what :func:`stashed` has of them."""
    if STASHED:
        return kept.load(words_of(WARPS))
    else:
        return kept
