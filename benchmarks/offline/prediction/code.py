"""NVIDIA machine code, as ``nvdisasm -c -hex`` writes it, as instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

NONE = 7
"""The number of a scoreboard that is none."""


@dataclass
class Instruction:
    """One instruction, with the bits by which the compiler schedules it.

    Attributes:
        op: with modifiers, such as "LDG.E.128".
        predicate: "P0", "!P0" or "".
        operands: as written, without ".reuse".
        target: the label of a branch or a call.
        stall: clocks until the warp may issue its next instruction.
        write, read: the scoreboard that is set until the result is there, or until the operands have been read.
        wait: which scoreboards, as bits, must be free before this instruction.
    """

    op: str
    predicate: str
    operands: list[str]
    target: str = ""
    stall: int = 1
    write: int = NONE
    read: int = NONE
    wait: int = 0
    registers: tuple[str, ...] = field(default=())

    @cached_property
    def parts(self) -> list[str]:
        return self.op.split(".")

    @cached_property
    def base(self) -> str:
        return self.parts[0]

    @cached_property
    def width(self) -> int:
        """Bytes that a load or store moves for a thread."""
        widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
        return next((widths[part] for part in self.parts[1:] if part in widths), 4)

    @cached_property
    def matrices(self) -> int:
        """Of 8 x 16 bytes, that LDSM or STSM moves for a warp."""
        return int(self.parts[-1]) if self.parts[-1].isdigit() else 1


CODE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?);\s*/\* 0x([0-9a-f]{16}) \*/")
UPPER_HALF = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/\s*$")
LABEL = re.compile(r"^([.$][\w$.]+):")
TARGET = re.compile(r"`\(([\w$.]+)\)")


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and which of them each label stands before."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(found)
        elif code := CODE.match(line):
            operands = code[4].replace(".reuse", "")
            target = TARGET.search(operands)
            found.append(
                Instruction(
                    code[3], code[2] or "", [part.strip() for part in operands.split(",") if part.strip()],
                    target[1] if target else "", registers=tuple(re.findall(r"\bR\d+", operands)),
                )
            )  # fmt: skip
        elif found and (half := UPPER_HALF.match(line)):
            bits, last = int(half[1], 16), found[-1]
            last.stall, last.write, last.read, last.wait = (
                bits >> 41 & 15, bits >> 46 & 7, bits >> 49 & 7, bits >> 52 & 63
            )  # fmt: skip
    return found, labels
