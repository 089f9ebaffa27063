"""What the Gluon kernels of the backward pass share: 32 channels at a time, in the order of the operands.

A warp has 16 whole rows.  Of a chunk (R, 32), R = 16 warps, lane l has the channels 8 (l mod 4) to 8 (l mod 4) + 7 of
rows l / 4 and l / 4 + 8, 16 bytes each (:func:`lines`).  Products on tensor cores may take the channels of a sum in any
order, and give their columns in any, so that :func:`as_left`, :func:`as_right` and :func:`from_result` move nothing.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from dydila_kernels.ops.gluon.common import REGISTERS, RELU

CHUNK = gl.constexpr(32)
# Older Tritons have these under other names.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.constexpr_function
def result(warps):
    """Of ``mma.sync``: (16 warps, columns)."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1], instr_shape=[16, 8])


@gluon.constexpr_function
def lines(warps):
    """(16 warps, CHUNK): 16 bytes a lane of each of two rows."""
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16 << i, 0] for i in range(warps.bit_length() - 1)], [], [16 * warps, 32],
    )  # fmt: skip


@gluon.constexpr_function
def row(warps):
    """(16 warps,): what is known of rows."""
    return gl.SliceLayout(1, lines(warps))


@gluon.constexpr_function
def columns(warps):
    """(CHUNK, CHUNK) of a right operand before :func:`as_right`: 16 bytes a lane of each of four columns."""
    return gl.DistributedLinearLayout(
        [[1, 0], [2, 0], [4, 0], [0, 8], [0, 16]], [[8, 0], [16, 0], [0, 1], [0, 2], [0, 4]],
        [[0, 0] for i in range(warps.bit_length() - 1)], [], [32, 32],
    )  # fmt: skip


@gluon.jit
def as_left(x, PLACED: gl.constexpr, WARPS: gl.constexpr):
    """(R, CHUNK) as left operand; PLACED: the rows of the right one lie in the order of :func:`place`."""
    WIDTH: gl.constexpr = 2 if PLACED else 4
    x = gl.permute(gl.reshape(x, (16 * WARPS, 4, 8 // WIDTH, WIDTH)), (0, 2, 1, 3))
    layout: gl.constexpr = gl.DotOperandLayout(0, result(WARPS), WIDTH)
    return gl.convert_layout(gl.reshape(x, (16 * WARPS, CHUNK)), layout, assert_trivial=True)


@gluon.jit
def as_right(x, WARPS: gl.constexpr):
    """(CHUNK, CHUNK) as right operand."""
    x = gl.permute(gl.reshape(x, (4, 2, 4, CHUNK)), (1, 0, 2, 3))
    layout: gl.constexpr = gl.DotOperandLayout(1, result(WARPS), 4)
    return gl.convert_layout(gl.reshape(x, (CHUNK, CHUNK)), layout, assert_trivial=True)


@gluon.jit
def from_result(x, WARPS: gl.constexpr):
    """(R, CHUNK), the result of a product whose columns were in the order of :func:`place`, as lines."""
    x = gl.permute(gl.reshape(x, (16 * WARPS, 4, 4, 2)), (0, 2, 1, 3))
    return gl.convert_layout(gl.reshape(x, (16 * WARPS, CHUNK)), lines(WARPS), assert_trivial=True)


@gluon.constexpr_function
def chunks_of(head_dim):
    """Chunks of a head; the last may be a part of one."""
    return -(-head_dim // 32)


@gluon.jit
def in_head(mask, c, E: gl.constexpr, WARPS: gl.constexpr):
    """mask (R, 1) of the rows, and which channels of chunk c of a head there are."""
    if E % CHUNK == 0:
        return mask
    else:
        return mask & (c * CHUNK + gl.arange(0, CHUNK, layout=gl.SliceLayout(0, lines(WARPS))) < E)[None, :]


@gluon.jit
def fold(x):
    """(R, CHUNK) lines -> (R, 4): the sums of what a lane has of each row."""
    return gl.sum(gl.reshape(x, (x.shape[0], 4, CHUNK // 4)), 2)


@gluon.jit
def nothing(WARPS: gl.constexpr):
    """Of :func:`fold`."""
    return fold(gl.zeros([16 * WARPS, CHUNK], gl.float32, lines(WARPS)))


@gluon.jit
def total(x, WARPS: gl.constexpr):
    """(R, 4) of :func:`fold` -> (R,)."""
    return gl.convert_layout(gl.sum(x, 1), row(WARPS))


@gluon.jit
def place(n):
    """The channel of column n of a chunk, such that what a lane has of a result are neighbours."""
    return n % 8 // 2 * 8 + n // 8 * 2 + n % 2


# Rows -----------------------------------------------------------------------------------------------------------------


@gluon.jit
def pointers(x, stride_xb, stride_xn, image, first, WARPS: gl.constexpr):
    """Pointers (R, CHUNK) to the first channels of the rows from ``first`` of an image on."""
    rows = gl.arange(0, 16 * WARPS, layout=row(WARPS)).to(gl.int64)
    channels = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, lines(WARPS)))
    start = x + (image * stride_xb + first.to(gl.int64) * stride_xn)
    return start + rows[:, None] * stride_xn + channels[None, :]


# Matrices -------------------------------------------------------------------------------------------------------------


@gluon.jit
def blocks_for(dtype: gl.constexpr, E: gl.constexpr, SLOTS: gl.constexpr):
    """Shared memory for matrices (e, e): for each chunk of columns all blocks (SLOTS chunks, CHUNK, CHUNK) of it.

    Each is a piece of its own: between accesses to one piece, of whatever slot, the compiler puts barriers.
    """
    J: gl.constexpr = chunks_of(E)
    layout: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
    blocks = ()
    for _ in gl.static_range(J):
        blocks += (gl.allocate_shared_memory(dtype, [SLOTS * J, CHUNK, CHUNK], layout),)
    return blocks


@gluon.jit
def copy_matrix(blocks, slot, matrix, E: gl.constexpr, STRIDE: gl.constexpr, WARPS: gl.constexpr):
    """matrix (e, e), its rows STRIDE apart, on its way to a slot of :func:`blocks_for`, the rows of each block in the
    order of :func:`place`."""
    J: gl.constexpr = chunks_of(E)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
    r = place(gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout)))[:, None]
    c = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, layout))[None, :]
    for j in gl.static_range(J):
        for i in gl.static_range(J):
            block = matrix + i * CHUNK * STRIDE + j * CHUNK + (r * STRIDE + c)
            if E % CHUNK == 0:
                async_load(blocks[j].index(slot * J + i), block)
            else:
                there = (r < E - i * CHUNK) & (c < STRIDE - j * CHUNK)
                async_load(blocks[j].index(slot * J + i), block, mask=there)


@gluon.jit
def product(lefts, blocks, row, PLACED: gl.constexpr, WARPS: gl.constexpr):
    """(R, CHUNK) float32: the left operands, one for each chunk, times a row of blocks, transposed.

    PLACED: the columns of the matrix lie in the order of :func:`place`, in each chunk.
    """
    acc = gl.zeros([16 * WARPS, CHUNK], gl.float32, result(WARPS))
    for j in gl.static_range(len(lefts)):
        block = blocks[j].index(row).permute((1, 0))
        if PLACED:
            right = block.load(gl.DotOperandLayout(1, result(WARPS), 2))
        else:
            right = as_right(block.load(columns(WARPS)), WARPS)
        acc = mma_v2(lefts[j], right, acc)
    return from_result(acc, WARPS)


@gluon.jit
def add_products(sums, left, blocks, row, WARPS: gl.constexpr):
    """sums (R, CHUNK) for each chunk of columns, and left (R, CHUNK) times a row of blocks, columns and rows placed."""
    found = ()
    for j in gl.static_range(len(sums)):
        right = blocks[j].index(row).load(gl.DotOperandLayout(1, result(WARPS), 2))
        found += (mma_v2(left, right, sums[j]),)
    return found


# Two channels at a time -----------------------------------------------------------------------------------------------


@gluon.constexpr_function
def raising(dtype):
    """Assembly: p twice, from z, gamma twice and gamma log2 1/m twice; zero where r is, whatever gamma."""
    code = ""
    for p, r, gamma, shift in (("$0", "x", "$3", "$5"), ("$1", "y", "$4", "$6")):
        code += f"setp.neu.ftz.f32 test, {r}, 0f00000000; lg2.approx.ftz.f32 {r}, {r};"
        code += f"fma.rn.ftz.f32 {r}, {r}, {gamma}, {shift}; ex2.approx.ftz.f32 {r}, {r};"
        code += f"selp.f32 {p}, {r}, 0f00000000, test;"
    return REGISTERS + RELU[dtype].format(z="$2") + code + "}"


@gluon.constexpr_function
def parting(dtype):
    """Assembly: s = r / m, log2 s and q = s^(gamma - 1), each twice, from z, 1/m twice and gamma - 1 twice; q is zero
    where s is."""
    code = ""
    for i, r in enumerate("xy"):
        s, log, q, inverse, power = (f"${i + n}" for n in (0, 2, 4, 7, 9))
        code += f"mul.ftz.f32 {r}, {r}, {inverse}; setp.neu.f32 test, {r}, 0f00000000; mov.f32 {s}, {r};"
        code += f"max.NaN.f32 {r}, {r}, 0f00800000; lg2.approx.ftz.f32 {r}, {r}; mov.f32 {log}, {r};"
        code += f"mul.ftz.f32 {r}, {r}, {power}; ex2.approx.ftz.f32 {r}, {r}; selp.f32 {q}, {r}, 0f00000000, test;"
    return REGISTERS + RELU[dtype].format(z="$6") + code + "}"


@gluon.jit
def raised(z, gamma, shift):
    """p (R, C) float32, of z (R, C), gamma and gamma log2 1/m (R,)."""
    return gl.inline_asm_elementwise(
        raising(z.dtype), "=&r,=&r,r,r,r,r,r", [z, gamma[:, None], shift[:, None]], dtype=gl.float32, is_pure=True,
        pack=2,
    )  # fmt: skip


@gluon.jit
def parts(z, inverse, power):
    """s, log2 s and q (R, C) float32, of z (R, C), and 1/m and gamma - 1 (R,)."""
    return gl.inline_asm_elementwise(
        parting(z.dtype), "=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r", [z, inverse[:, None], power[:, None]],
        dtype=(gl.float32, gl.float32, gl.float32), is_pure=True, pack=2,
    )  # fmt: skip
