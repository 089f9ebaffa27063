"""What the whole layer is meant to reach, held against the rows of a run of :mod:`benchmarks.layer`.

Times are those of plain calls, host included, of one image: the time of a call over its batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from benchmarks.harness import Row


class Goal(NamedTuple):
    """A limit for a ratio of rows of one width and mode.

    Attributes:
        measure: "speed" is the time of ``rival`` over ours, at least ``limit``; "memory" our peak over that of
            ``rival``, at most ``limit``; "growth" our time over that of a quarter of the tokens, at most ``limit``.
        rival: where it has several numbers of heads, the row of as many heads as ours counts.
        tokens: N for which it is to hold; with ``and_more`` all larger N too.
    """

    mode: str
    measure: Literal["speed", "memory", "growth"]
    limit: float
    tokens: int
    and_more: bool = False
    rival: str = ""

    def __str__(self) -> str:
        where = f"from N = {self.tokens} up" if self.and_more else f"at N = {self.tokens}"
        what = {
            "speed": f"at least {self.limit:g} times as fast as {self.rival}",
            "memory": f"at most {self.limit:g} times the peak memory of {self.rival}",
            "growth": f"at most {self.limit:g} times the time of N/4",
        }
        return f"{self.mode}: {what[self.measure]} {where}"


CPU = (
    Goal("forward", "speed", 1.0, 1024, and_more=True, rival="softmax"),
    Goal("forward", "speed", 3.0, 4096, rival="softmax"),
    Goal("forward", "speed", 10.0, 16384, rival="softmax"),
    Goal("forward", "growth", 4.5, 16384),
)
GPU = (
    *(Goal(mode, "speed", 1.0, 1024, and_more=True, rival="sana") for mode in ("forward", "backward")),
    *(Goal(mode, "speed", 1.0, 2048, and_more=True, rival="softmax") for mode in ("forward", "backward")),
    *(Goal(mode, "speed", 10.0, 16384, rival="softmax") for mode in ("forward", "backward")),
    *(Goal(mode, "memory", 1.0, 256, and_more=True, rival="sana") for mode in ("forward", "forward+backward")),
    *(Goal(mode, "growth", 4.2, 65536) for mode in ("forward", "backward")),
)
"""Those of DESIGN.md, section 7."""


class Verdict(NamedTuple):
    """A goal for our layer of one width and number of heads.

    ``measured`` is the ratio that is nearest to missing it, in words; ``met`` is None where nothing was measured.
    """

    goal: Goal
    layer: str
    measured: str
    met: bool | None


def goals(rows: Sequence[Row]) -> list[Verdict]:
    """Every goal of the device for each of our layers among the rows of one run."""
    layers = dict.fromkeys((row["dim"], row["heads"]) for row in rows if row["name"] == "dydila")
    on_gpu = any(row["device_type"] == "cuda" for row in rows)
    return [verdict(goal, rows, *layer) for goal in (GPU if on_gpu else CPU) for layer in layers]


def verdict(goal: Goal, rows: Sequence[Row], dim: int, heads: int) -> Verdict:
    """Of one goal for one layer.  Where our layer has no result, the goal is missed; where a rival has none, that size
    does not count."""
    layer = f"d={dim} H={heads}"
    of_mode = [row for row in rows if row["mode"] == goal.mode and row["dim"] == dim]
    ours = {row["tokens"]: row for row in of_mode if row["name"] == "dydila" and row["heads"] == heads}
    rival_rows = [row for row in of_mode if row["name"] == goal.rival]
    as_many_heads = [row for row in rival_rows if row["heads"] == heads]
    rival = {row["tokens"]: row for row in as_many_heads or rival_rows}

    ratios: dict[int, float] = {}
    for tokens in sorted(n for n in ours if n == goal.tokens or (goal.and_more and n > goal.tokens)):
        if ours[tokens]["skipped"]:
            return Verdict(goal, layer, f"{ours[tokens]['skipped']} at N = {tokens}", False)
        if (ratio := ratio_at(goal, tokens, ours, rival)) is not None:
            ratios[tokens] = ratio
    if not ratios:
        return Verdict(goal, layer, "not measured", None)
    worst = (min if goal.measure == "speed" else max)(ratios, key=lambda n: ratios[n])
    met = ratios[worst] >= goal.limit if goal.measure == "speed" else ratios[worst] <= goal.limit
    return Verdict(goal, layer, f"{ratios[worst]:.2f} at N = {worst}", met)


def ratio_at(goal: Goal, tokens: int, ours: Mapping[int, Row], rival: Mapping[int, Row]) -> float | None:
    """What the goal limits, at one size; None where a row it needs is not there or has no result."""
    row = ours[tokens]
    other = ours.get(tokens // 4) if goal.measure == "growth" else rival.get(tokens)
    if other is None or other["skipped"]:
        return None
    if goal.measure == "memory":
        known = row.get("peak_mib") is not None and other.get("peak_mib")
        return row["peak_mib"] / other["peak_mib"] if known else None
    ours_ms, other_ms = (each["median_ms"] / each["batch"] for each in (row, other))
    return ours_ms / other_ms if goal.measure == "growth" else other_ms / ours_ms


def verdicts(found: Sequence[Verdict]) -> str:
    """One line for each goal, and below it one for each layer."""
    words = {True: "met", False: "MISSED", None: ""}
    lines = []
    for goal in dict.fromkeys(each.goal for each in found):
        lines.append(str(goal))
        lines += [f"  {each.layer}: {each.measured}  {words[each.met]}".rstrip() for each in found if each.goal == goal]
    return "\n".join(lines)
