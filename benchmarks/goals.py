"""What the kernels and the layer are meant to reach, held against the rows of a run of their suite.

Times are those of plain calls, host included, of one image: the time of a call over its batch.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from benchmarks.harness import Row
from benchmarks.roofline import GIGA, TERA


class Goal(NamedTuple):
    """A limit for a ratio of rows of one width and mode.

    "speed" is the time of ``rival`` over ours, at least ``limit``; "slowness" the same, at most ``limit``; "memory" our
    peak over that of ``rival``, "growth" our time over that of a quarter of the tokens, "floor" our time over that of a
    copy of the declared bytes, "products" our time over that of the declared FLOPs and bytes one after the other, with
    float32 products by ``rival``, all at most ``limit``; "ceiling" the percentage of the nearer ceiling, at least.
    """

    mode: str
    measure: Literal["speed", "slowness", "memory", "growth", "floor", "products", "ceiling"]
    limit: float
    tokens: int  # N for which it is to hold
    and_more: bool = False  # whether for all larger N too
    rival: str = ""  # where it has several numbers of heads, the row of as many heads as ours counts
    layers: tuple[tuple[int, int], ...] = ()  # (d, H) for which it is to hold; by default all
    stage: str | None = None

    def __str__(self) -> str:
        where = f"from N = {self.tokens} up" if self.and_more else f"at N = {self.tokens}"
        what = {
            "speed": f"at least {self.limit:g} times as fast as {self.rival}",
            "slowness": f"{self.rival} at most {self.limit:g} times as slow",
            "memory": f"at most {self.limit:g} times the peak memory of {self.rival}",
            "growth": f"at most {self.limit:g} times the time of N/4",
            "floor": f"at most {self.limit:g} times the time that memory takes",
            "products": f"at most {self.limit:g} times the time of the products by {self.rival} and of the bytes",
            "ceiling": f"at least {self.limit:g} % of the ceiling",
        }
        return f"{self.stage + ' ' if self.stage else ''}{self.mode}: {what[self.measure]} {where}"


PRODUCTS = {"torch.mm": "float32_mm_tflop_s", "torch.mm or oneDNN": "float32_tflop_s"}
"""The ceilings of float32 products: torch's own, and the faster one; on many CPUs there is but the latter."""

CPU = (
    Goal("forward", "speed", 1.0, 1024, True, "softmax"),
    Goal("forward", "speed", 3.0, 4096, rival="softmax"),
    Goal("forward", "speed", 10.0, 16384, rival="softmax"),
    Goal("forward", "growth", 4.5, 16384),
    *(Goal(mode, "speed", 0.65, 1024, True, "sana") for mode in ("forward", "forward+backward")),
    Goal("forward+backward", "memory", 1.0, 256, True, "sana"),
    *(Goal(mode, "slowness", 1.0, 256, True, "dydila compiled") for mode in ("forward", "forward+backward")),
    *(Goal("forward+backward", "products", 1.15, 1024, True, product) for product in PRODUCTS),
)
GPU = (
    *(Goal(mode, "speed", 1.0, 1024, True, "sana") for mode in ("forward", "backward")),
    *(Goal(mode, "speed", 1.0, 2048, True, "softmax") for mode in ("forward", "backward")),
    *(Goal(mode, "speed", 10.0, 16384, rival="softmax") for mode in ("forward", "backward")),
    *(Goal(mode, "memory", 1.0, 256, True, "sana") for mode in ("forward", "forward+backward")),
    *(Goal(mode, "growth", 4.2, 65536) for mode in ("forward", "backward")),
)
HEADS_OF_64, HEADS_OF_72, ONE_HEAD = ((768, 12),), ((1152, 16),), ((384, 1), (768, 1), (1152, 1))
CORE = (
    *(Goal("forward", "floor", limit, 4096, layers=HEADS_OF_64) for limit in (2.1, 1.5)),  # a milestone, and the aim
    *(Goal("backward", "floor", limit, 4096, layers=HEADS_OF_64) for limit in (2.0, 1.6)),
    *(Goal(mode, "floor", 3.0, 4096, layers=HEADS_OF_72) for mode in ("forward", "backward")),
    Goal("forward", "ceiling", 60, 4096, layers=ONE_HEAD),
)
STAGES = (Goal("forward", "floor", 2.0, 4096, layers=ONE_HEAD, stage="tokens"),)
GOALS = {("layer", "cpu"): CPU, ("layer", "cuda"): GPU, ("core", "cuda"): CORE, ("stages", "cuda"): STAGES}
"""By suite and type of device."""


class Verdict(NamedTuple):
    """A goal for our layer of one width and number of heads."""

    goal: Goal
    layer: str
    measured: str  # the ratio that is nearest to missing it, in words
    met: bool | None  # None where nothing was measured


def goals(rows: Sequence[Row]) -> list[Verdict]:
    """Every goal of the suite and the device, for each of our layers among the rows of one run that it is for."""
    layers = dict.fromkeys((row["dim"], row["heads"]) for row in rows if row["name"] == "dydila" and "heads" in row)
    kinds = dict.fromkeys((row["suite"], row["device_type"]) for row in rows)
    wanted = [goal for kind in kinds for goal in GOALS.get(kind, ())]
    return [verdict(goal, rows, *layer) for goal in wanted for layer in layers if layer in (goal.layers or layers)]


def verdict(goal: Goal, rows: Sequence[Row], dim: int, heads: int) -> Verdict:
    """Of one goal for one layer.  Where our layer has no result, the goal is missed; where a rival has none, that size
    does not count."""
    layer = f"d={dim} H={heads}"
    of_goal = [r for r in rows if (r["mode"], r["dim"], r.get("stage")) == (goal.mode, dim, goal.stage)]
    ours = {row["tokens"]: row for row in of_goal if row["name"] == "dydila" and row.get("heads") == heads}
    rival_rows = [row for row in of_goal if row["name"] == goal.rival]
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
    at_least = goal.measure in ("speed", "ceiling")
    worst = (min if at_least else max)(ratios, key=lambda n: ratios[n])
    met = ratios[worst] >= goal.limit if at_least else ratios[worst] <= goal.limit
    return Verdict(goal, layer, f"{ratios[worst]:.2f} at N = {worst}", met)


def ratio_at(goal: Goal, tokens: int, ours: Mapping[int, Row], rival: Mapping[int, Row]) -> float | None:
    """What the goal limits, at one size; None where a row it needs is not there or has no result."""
    row = ours[tokens]
    if goal.measure == "ceiling":
        return row["percent_of_ceiling"]
    if goal.measure == "floor":
        return row["ceilings"]["copy_gb_s"] / row["gb_s"]
    if goal.measure == "products":
        ceilings = row["ceilings"]
        rate = ceilings.get(PRODUCTS[goal.rival], ceilings["float32_tflop_s"])
        seconds = row["flops"] / (rate * TERA) + row["bytes"] / (ceilings["copy_gb_s"] * GIGA)
        return row["median_ms"] / 1e3 / seconds
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
