"""What the checks of an emulated launch find."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

NOTE = "note"
"""Kinds that begin so are no fault, see :func:`tools.ptx.races.Shadow.check_duplicates`."""


class Place(NamedTuple):
    """Where: the kernel, the line of its PTX and the instruction there, and the line of the Triton source."""

    kernel: str
    line: int
    text: str
    source: str


@dataclass
class Report:
    """Findings of several launches.

    Attributes:
        lanes: (kind, place) -> how many threads did so.
        examples: (kind, place) -> one of them, in words.
        launches: name of a kernel -> launches.
    """

    lanes: Counter[tuple[str, Place]] = field(default_factory=Counter)
    examples: dict[tuple[str, Place], str] = field(default_factory=dict)
    launches: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, place: Place, lanes: int, example: str = "") -> None:
        self.lanes[kind, place] += lanes
        self.examples.setdefault((kind, place), example)

    def kinds(self, notes: bool = False) -> list[str]:
        """The kinds of faults found, each once; with the notes if wanted."""
        return list(dict.fromkeys(kind for kind, _ in self.lanes if notes or not kind.startswith(NOTE)))

    def faults(self) -> list[str]:
        """A line for each fault and place, worst first."""
        return [
            f"{kind}: {place.kernel}, PTX line {place.line}, {place.source}: `{place.text}`, {lanes} threads, "
            f"e.g. {self.examples[kind, place] or 'any'}"
            for (kind, place), lanes in self.lanes.most_common()
            if not kind.startswith(NOTE)
        ]

    def clear(self) -> None:
        """Forgets the findings, not the launches."""
        self.lanes.clear()
        self.examples.clear()
