"""How each kernel is launched: a small frozen table, each entry with its reason.

Nothing is tuned behind the user's back.  A configuration depends on the stage, the precision of the tokens and one
width (of a head or a product), never on B or N.  :mod:`dydila_kernels.tuning` measures others for those who ask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """One launch configuration.

    Attributes:
        block_n: tokens of a tile.
        block_d: channels that a program works on at a time.
        warps, stages: ``num_warps`` and ``num_stages`` of the launch.
        block_k: length of a step along the summed dimension of a matrix product, where that is neither of the above.
        registers: of a thread at most (``maxnreg``), or None for what the compiler takes.
        reason: why these values.
    """

    block_n: int
    block_d: int
    warps: int
    stages: int = 1
    block_k: int = 0
    registers: int | None = None
    reason: str = ""

    @property
    def options(self) -> dict[str, int]:
        """Triton's options of a launch."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


@dataclass(frozen=True)
class Entry:
    """The configuration for widths up to ``width``."""

    width: int
    config: Config


ANY = 2**31
LARGEST_HEAD = 128
"""Channels of a head whose state, (e, e) float32, programs can hold; wider heads take GEMMs."""

TABLE: dict[tuple[str, str], tuple[Entry, ...]] = {}
"""(stage, precision) -> entries by ascending width; precision is "half" (16 bits) or "single" (float32)."""

# tokens.py, linear_attention.py, gradients.py; the width is that of a head, for "tokens" d
WALK = "16 elements a thread and tile: what a pass over a row keeps in registers beside its sums"
TABLE |= {
    ("tokens", "half"): (Entry(ANY, Config(64, 32, 4, reason=WALK)),),
    ("tokens", "single"): (Entry(ANY, Config(32, 32, 4, reason="float32 operands take twice the registers")),),
    ("state", "half"): (
        Entry(64, Config(64, 32, 4, 3, reason="two tiles are on their way; half a head of 64")),
        Entry(80, Config(32, 32, 4, reason="columns of 128 leave room for half the rows, and for no tile on its way")),
        Entry(ANY, Config(64, 32, 4, 2, reason="the next tile is on its way; a quarter of a head of 128")),
    ),
    ("state", "single"): (Entry(ANY, Config(32, 16, 4, reason="FMA bound: registers decide")),),
    ("readout", "half"): (
        Entry(64, Config(64, 32, 4, reason=WALK)),
        Entry(ANY, Config(32, 32, 4, reason="columns of 128 leave room for half the rows")),
    ),
    ("readout", "single"): (
        Entry(64, Config(32, 16, 4, reason="FMA bound: registers decide")),
        Entry(ANY, Config(16, 16, 4, reason="FMA bound: registers decide")),
    ),
    ("gradients", "half"): (
        Entry(64, Config(32, 32, 4, reason="dy, two powers and their slopes at a time")),
        Entry(80, Config(32, 16, 4, reason="72 and 80 are 5 x 16")),
        Entry(ANY, Config(32, 32, 4, reason="dy, two powers and their slopes at a time")),
    ),
    ("gradients", "single"): (Entry(ANY, Config(16, 16, 4, reason="FMA bound: registers decide")),),
    ("routed_gradients", "half"): (
        Entry(96, Config(16, 32, 4, reason="logits of two routers on top: few rows")),
        Entry(LARGEST_HEAD, Config(16, 32, 8, reason="and an operand of 128 columns: twice the threads to hold it")),
        Entry(ANY, Config(32, 16, 4, reason="dy is read: no operand to hold")),
    ),
    ("routed_gradients", "single"): (Entry(ANY, Config(16, 16, 4, reason="FMA bound: registers decide")),),
    ("given_gradients", "half"): (Entry(ANY, Config(32, 32, 4, reason="two powers and their slopes at a time")),),
    ("given_gradients", "single"): (Entry(ANY, Config(32, 32, 4, reason=WALK)),),
}

# gluon/ and the products of what it writes; the width is that of a head, for tokens d
HELD = "16 tokens, whole, in the registers of all warps; while one program loads, another works"
TABLE |= {
    ("gluon_tokens", "half"): (
        Entry(384, Config(16, 32, 4, registers=128, reason=HELD)),
        Entry(768, Config(16, 32, 8, registers=128, reason=HELD)),
        Entry(ANY, Config(16, 32, 8, registers=128, reason=f"{HELD}; powers of one branch wait in shared memory")),
    ),
    ("gluon_tokens_with_more", "half"): (
        Entry(384, Config(16, 32, 4, registers=168, reason="logits of more than 16 choices on top: three programs")),
        Entry(ANY, Config(16, 32, 8, reason="one program, which may have all registers: the words of 1280 channels")),
    ),
    ("prepare", "half"): (
        Entry(ANY, Config(4096, 1, 4, reason="the largest of some thousand numbers in a few steps")),
    ),
    ("written_state", "half"): (
        Entry(64, Config(64, 64, 4, 3, reason="two tiles on their way; a head at once, so that nothing is read twice")),
        Entry(80, Config(64, 128, 8, 3, reason="a head of 72 at once; the columns of 128 over twice the threads")),
        Entry(ANY, Config(64, 64, 8, 3, reason="half a head of 128, its columns over twice the threads")),
    ),
    ("written_state", "single"): (
        Entry(64, Config(64, 32, 4, 3, reason="Kh of float16 under denominator: two tiles on their way; half a head")),
        Entry(80, Config(32, 32, 4, 3, reason="columns of 128 leave room for half the rows")),
        Entry(ANY, Config(64, 32, 4, 2, reason="the next tile is on its way; a quarter of a head of 128")),
    ),
    ("product", "single"): (
        Entry(64, Config(64, 32, 4, reason="Qh of float16 under denominator: half a head")),
        Entry(ANY, Config(32, 32, 4, reason="columns of 128 leave room for half the rows")),
    ),
    ("product", "half"): (
        Entry(64, Config(128, 64, 8, reason="a head at once; its state is read for twice the rows of a program of 64")),
        Entry(80, Config(64, 128, 4, reason="a head of 72 at once: three barriers less than in steps of 32 channels")),
        Entry(ANY, Config(64, 64, 4, reason="a head in two steps")),
    ),
}

# gluon/gradients.py, gluon/dots.py; the width is that of a head
ROW_STAGES = {
    "gluon_gradients", "gluon_gradients_once", "gluon_gradients_of_terms", "gluon_given_gradients", "gluon_dots",
}  # fmt: skip
"""Those whose warps have 16 rows each, 32 channels at a time: only tokens and warps can change, alike."""
ROWS = "16 rows a warp; 128 registers: four programs on a multiprocessor"
WIDE_ROWS = "shared memory leaves room for two programs: as many registers as they like"
TABLE["gluon_gradients_once", "half"] = (
    Entry(96, Config(64, 32, 4, registers=128, reason=ROWS)),
    Entry(ANY, Config(64, 32, 4, reason=WIDE_ROWS)),
)
TABLE["gluon_gradients", "half"] = (
    Entry(64, Config(64, 32, 4, registers=128, reason=ROWS)),
    Entry(ANY, Config(64, 32, 4, reason=WIDE_ROWS)),
)
TABLE["gluon_gradients_of_terms", "half"] = (
    Entry(64, Config(64, 32, 4, registers=144, reason="gradients of denominator terms on top: three programs")),
    Entry(ANY, Config(64, 32, 4, reason=WIDE_ROWS)),
)
TABLE["gluon_given_gradients", "half"] = (Entry(ANY, Config(64, 32, 4, registers=128, reason=ROWS)),)
TILES = "two tiles in shared memory: three programs, of as many registers"
TABLE["gluon_dots", "half"] = (
    Entry(64, Config(64, 32, 4, registers=168, reason=TILES)),
    Entry(ANY, Config(64, 32, 4, reason=WIDE_ROWS)),
)

# rotary.py; the width is that of a head, columns are pairs of channels
TURN = "lines of 128 bytes; 4 pairs a thread beside their tables: 32 registers, which leave room for all warps"
TABLE |= {
    ("rotary", "half"): (Entry(ANY, Config(16, 32, 4, reason=TURN)),),
    ("rotary", "single"): (Entry(ANY, Config(16, 32, 4, reason=TURN)),),
}

# projection.py; the width is n_P for "route", the channels of the result for "projection"
TABLE |= {
    ("route", "half"): (
        Entry(
            16, Config(64, 32, 2, 4, reason="32 rows a warp, by mma.sync: wgmma wants each part of a router in turn")
        ),
        Entry(ANY, Config(32, 16, 4, 2, reason="two tiles of 128 logits fit in registers")),
    ),
    ("route", "single"): (
        Entry(16, Config(32, 32, 2, 3, reason="rows of 128 bytes; tf32x3 triples operands")),
        Entry(ANY, Config(32, 16, 4, 2, reason="two tiles of 128 logits fit in registers")),
    ),
    ("plan", "half"): (
        Entry(ANY, Config(block_n=1024, block_d=1, warps=4, reason="few blocks, so a short running sum")),
    ),
    ("projection", "half"): (
        Entry(
            ANY,
            Config(
                block_n=256,
                block_d=128,
                warps=8,
                stages=3,
                block_k=32,
                reason="L2 binds: 3/4 of what squares of 128 read; no spills, 72 KiB; 128 divide 384, 768, 1152",
            ),
        ),
    ),
    ("projection", "single"): (
        Entry(ANY, Config(block_n=64, block_d=64, warps=4, stages=3, block_k=32, reason="FMA bound: registers decide")),
    ),
    ("projection_weight", "half"): (
        Entry(
            ANY,
            Config(
                block_n=32,
                block_d=128,
                warps=8,
                stages=5,
                reason="stages for list, then tokens: with 5 two steps of tokens are in flight; 102 registers on sm_90",
            ),
        ),
    ),
    ("projection_weight", "single"): (
        Entry(ANY, Config(block_n=32, block_d=64, warps=4, stages=5, reason="FMA bound; stages as for half")),
    ),
    ("projection_sum", "single"): (Entry(ANY, Config(block_n=1, block_d=1024, warps=4, reason="8 elements a thread")),),
}

# Depth-wise convolution (depthwise.py) --------------------------------------------------------------------------------

STRIP = "two channels a thread, whose weights and three rows fit its registers; 128 divide 384, 768, 1152"
TABLE |= {
    (stage, precision): (Entry(ANY, Config(1, 128, 2, reason=STRIP)),)
    for stage in ("depthwise", "depthwise_gradients")
    for precision in ("half", "single")
}

TABLE["taps", "single"] = (Entry(ANY, Config(1, 128, 4, reason="one channel a thread: all its loads at once")),)

Key = tuple[str, str, int]
"""Stage, precision and exact width."""

TUNED: dict[Key, Config] = {}
"""What :func:`dydila_kernels.tuning.tune` found in this process."""

asked: dict[Key, None] | None = None
"""What is looked up, while :func:`dydila_kernels.tuning.tune` wants to know."""


def lookup(key: Key) -> Config:
    stage, precision, width = key
    tuned = TUNED.get(key)
    if tuned is not None:
        return tuned
    for entry in TABLE[stage, precision]:
        if width <= entry.width:
            return entry.config
    raise KeyError(key)


def pick(stage: str, dtype: torch.dtype, width: int = 0) -> Config:
    """The configuration of a stage for tokens of ``dtype`` and a head (or product) of ``width`` channels."""
    key = stage, "single" if dtype == torch.float32 else "half", width
    if asked is not None:
        asked[key] = None
    return lookup(key)
