"""The PTX of one kernel as basic blocks of instructions."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tools.ptx.arrays import WARP, WARPGROUP, Unsupported
from tools.ptx.findings import Place

ENDS_BLOCK = re.compile(r"(bra|ret|exit|bar\.sync|barrier\.sync)\b")
NEEDS_WARP = re.compile(r"(wgmma|shfl|mma|ldmatrix|stmatrix|redux|vote|match|bar\.warp|activemask|movmatrix)\b")


@dataclass
class Instruction:
    """``@predicate op operands``; the predicate is "%p1", "!%p1" or None."""

    op: str
    operands: list[str]
    predicate: str | None
    place: Place

    @property
    def parts(self) -> list[str]:
        """The opcode and its modifiers."""
        return self.op.replace("::", ".").split(".")


@dataclass
class Block:
    """Instructions without a branch, and what ends them.

    Attributes:
        end: a branch, a return, a barrier, or None where the next block follows.
        target: index of the block that a branch leads to.
        together: threads that must arrive together, 32 or 128, or 0 where each may run alone.
        functions: the Python made of the block, without and with a mask of active threads.
    """

    index: int
    body: list[Instruction] = field(default_factory=list)
    end: Instruction | None = None
    target: int = -1
    together: int = 0
    functions: dict[bool, Callable[..., None]] = field(default_factory=dict)


def split_operands(text: str) -> list[str]:
    """At the commas that no bracket encloses."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


class Kernel:
    """The parsed module of one entry.

    Attributes:
        shared: bytes of shared memory of a program.
        threads: of a program.
        registers: name -> index; kinds: bits of each, 1 for predicates.
        parameters: name -> (position, PTX type).
        symbols: name -> address in shared memory.
        granule: bytes of shared memory that are one place to the race checks: the narrowest access, 4 at most.
        constants: (value, bits) -> index, filled as code is generated.
        codes: the instructions that generated code may complain of, by their number.
    """

    def __init__(self, text: str, shared: int) -> None:
        self.text, self.shared, self.threads = text, shared, WARPGROUP
        self.registers: dict[str, int] = {}
        self.kinds: list[int] = []
        self.parameters: dict[str, tuple[int, str]] = {}
        self.symbols: dict[str, int] = {}
        self.constants: dict[tuple[int, int], int] = {}
        self.codes: list[Instruction] = []
        self.blocks = [Block(0)]
        entry = re.search(r"\.entry\s+([\w$]+)\s*\(", text)
        if entry is None:
            raise Unsupported("PTX without an entry")
        self.name = entry[1]
        self._parse_head(text, entry.end())
        self._parse_body(text, text.index("{", text.index(")", entry.end())))
        self.granule = min([4, *self._shared_widths()])

    def constant(self, value: int, bits: int) -> int:
        return self.constants.setdefault((value & ((1 << bits) - 1), bits), len(self.constants))

    def _parse_head(self, text: str, start: int) -> None:
        head = text[start : text.index(")", start)]
        for position, found in enumerate(re.finditer(r"\.param\s+\.(\w+)[^,]*?([\w$]+)\s*(?:,|$)", head.strip())):
            self.parameters[found[2]] = position, found[1]
        if threads := re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", text):
            self.threads = int(threads[1])
        offset = 0
        for found in re.finditer(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", text):
            offset = -(-offset // int(found[1])) * int(found[1])
            self.symbols[found[2]] = offset
            offset += int(found[3] or 0)

    def _parse_body(self, text: str, start: int) -> None:
        labels: dict[str, int] = {}
        scopes: list[dict[str, str]] = []
        block = self.blocks[0]
        for statement, line, source in statements(text, start):
            if statement == "{":
                scopes.append({})
            elif statement == "}":
                scopes.pop()
                if not scopes:
                    break
            elif statement.endswith(":"):
                if block.body:
                    block = self._next_block()
                labels[statement[:-1]] = block.index
            elif statement.startswith(".reg"):
                self._declare(statement, scopes)
            elif not statement.startswith("."):
                found = self._instruction(statement, scopes, line, source)
                if ENDS_BLOCK.match(found.op):
                    block.end = found
                    block = self._next_block()
                else:
                    if NEEDS_WARP.match(found.op):
                        block.together = max(block.together, WARPGROUP if found.op.startswith("wgmma") else WARP)
                    block.body.append(found)
            elif not statement.startswith((".pragma", ".local", ".branchtargets", ".callprototype")):
                raise Unsupported(statement)
        for block in self.blocks:
            if block.end is not None and block.end.op.startswith("bra"):
                block.target = labels[block.end.operands[0]]

    def _next_block(self) -> Block:
        self.blocks.append(Block(len(self.blocks)))
        return self.blocks[-1]

    def _instruction(self, text: str, scopes: list[dict[str, str]], line: int, source: str) -> Instruction:
        for scope in scopes[1:]:
            if scope:  # whole names, and not the parts of an opcode
                names = "|".join(map(re.escape, scope))
                text = re.sub(rf"(?<![\w.$%])({names})(?![\w.$])", lambda m, scope=scope: scope[m[1]], text)  # type: ignore[misc]
        found = re.match(r"(?:@(!?%?[\w$]+)\s+)?([\w.:]+)\s*(.*)$", text, re.S)
        if found is None:
            raise Unsupported(text)
        place = Place(self.name, line, text.replace("\t", " "), source)
        return Instruction(found[2], split_operands(found[3]), found[1], place)

    def _declare(self, text: str, scopes: list[dict[str, str]]) -> None:
        """Registers, such as ".reg .b32 %r<9>"; those of an inner scope get names of their own."""
        found = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text)
        if found is None:
            raise Unsupported(text)
        bits = 1 if found[1] == "pred" else bits_of(found[1])
        for name in map(str.strip, found[2].split(",")):
            many = re.match(r"(%?[\w$]+)<(\d+)>", name)
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                unique = one
                if len(scopes) > 1:
                    unique = scopes[-1][one] = f"%L{len(self.registers)}"
                self.registers[unique] = len(self.kinds)
                self.kinds.append(bits)

    def _shared_widths(self) -> Iterator[int]:
        """Bytes of the elements of each load and store of shared memory."""
        for block in self.blocks:
            for found in block.body:
                if found.op.startswith(("ld.shared", "st.shared")):
                    yield max(1, bits_of(found.op) // 8)


def bits_of(kind: str) -> int:
    """32 for "f32", and for "ld.global.v2.b32"."""
    return int(re.findall(r"\d+", kind)[-1])


def statements(text: str, start: int) -> Iterator[tuple[str, int, str]]:
    """Braces, labels ("name:") and statements without their semicolon, each with its line and the one of the source."""
    source, open_statement = "", ""
    for number, raw in enumerate(text[start:].splitlines(), text[:start].count("\n") + 1):
        code, _, comment = raw.partition("//")
        code = code.strip()
        if code.startswith(".loc"):
            source = comment.strip() or code
            continue
        while code:
            label = re.match(r"[$\w]+:", code)
            if not open_statement and code[0] in "{}":
                found, code = code[0], code[1:].strip()
            elif not open_statement and label:
                found, code = label[0], code[label.end() :].strip()
            elif ";" in code:
                first, _, code = code.partition(";")
                found, code, open_statement = f"{open_statement} {first}".strip(), code.strip(), ""
            else:
                open_statement += " " + code
                break
            yield found, number, source


def bits_of_argument(value: Any, kind: str) -> int:
    """What a parameter of PTX type ``kind`` holds for an int, a float, or an address."""
    if kind in ("f32", "f64"):
        return int.from_bytes(struct.pack("<f" if kind == "f32" else "<d", value), "little")
    return int(value) & ((1 << bits_of(kind)) - 1)
