"""From a block of PTX to a Python function: operands, results and addresses.

The function is ``block(R, K, M, act)``: registers, constants, the :class:`tools.ptx.machine.Machine`, and which threads
are active, or None.  The instructions themselves are written by :mod:`tools.ptx.instructions`.
"""

from __future__ import annotations

import re
import struct

from tools.ptx.arrays import Unsupported
from tools.ptx.parsing import Instruction, Kernel, bits_of, split_operands

SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid|%warpid")


class Writer:
    """Lines of Python for the instructions of a block.

    Attributes:
        masked: only some threads are active.
        active: the expression for the threads that the instruction at hand is for.
    """

    def __init__(self, kernel: Kernel, masked: bool) -> None:
        self.kernel, self.masked = kernel, masked
        self.lines: list[str] = []
        self.active = "None"

    def begin(self, instruction: Instruction) -> int:
        """Sets ``active``; returns the number of the instruction."""
        self.active = "act" if self.masked else "None"
        if instruction.predicate is not None:
            predicate = self.predicate(instruction.predicate)
            self.lines.append(f"on = {predicate} & act" if self.masked else f"on = {predicate}")
            self.active = "on"
        self.kernel.codes.append(instruction)
        return len(self.kernel.codes) - 1

    # Operands ---------------------------------------------------------------------------------------------------------

    def width(self, register: str) -> int:
        """Bits of a register."""
        return self.kernel.kinds[self.kernel.registers[register]]

    def constant(self, value: int, bits: int) -> str:
        return f"K[{self.kernel.constant(value, bits)}]"

    def raw(self, operand: str, bits: int) -> str:
        """An unsigned array of so many bits."""
        if operand.startswith("{"):
            parts = split_operands(operand[1:-1])
            each = bits // len(parts)
            terms = [f"({self.raw(part, each)}.astype(U{bits}) << U{bits}({i * each}))" for i, part in enumerate(parts)]
            return f"({' | '.join(terms)})"
        if operand in self.kernel.registers:
            have, text = self.width(operand), f"R[{self.kernel.registers[operand]}]"
            if have == 1:
                raise Unsupported(f"predicate as number: {operand}")
            return text if have == bits else f"{text}.astype(U{bits})"
        if SPECIAL.fullmatch(operand):
            return f"M.special[{operand!r}]" + ("" if bits == 32 else f".astype(U{bits})")
        if operand in self.kernel.symbols:
            return self.constant(self.kernel.symbols[operand], bits)
        return self.constant(immediate(operand, bits), bits)

    def registers(self, operand: str) -> str:
        """A list of arrays of 32 bits, of "{%r1, %r2}"."""
        return f"[{', '.join(self.raw(x, 32) for x in names_of(operand))}]"

    def value(self, operand: str, kind: str) -> str:
        """The operand as an array in the numpy dtype of a PTX type; float32 for bf16 and f16."""
        if kind == "pred":
            return self.predicate(operand)
        if kind in ("bf16", "f16"):
            return f"from_{kind}({self.raw(operand, 16)})"
        bits = bits_of(kind)
        text = self.raw(operand, max(bits, 16))
        if bits == 8:
            text = f"{text}.astype(U8)"
        view = {"s": f".view(I{bits})", "f": f".view(F{bits})"}
        return text + view.get(kind[0], "")

    def predicate(self, operand: str) -> str:
        name = operand.lstrip("!")
        if name in self.kernel.registers:
            text = f"R[{self.kernel.registers[name]}]"
        else:
            text = f"({self.constant(int(int(name, 0) != 0), 8)} != 0)"
        return f"(~{text})" if operand.startswith("!") else text

    def address(self, operand: str, bits: int) -> str:
        """Of "[%rd1 + 16]"."""
        found = re.match(r"^\[\s*(%?[\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]$", operand)
        if found is None:
            raise Unsupported(f"address {operand}")
        text, offset = self.raw(found[1], bits), int(found[2] or "0", 0)
        return f"({text} + {self.constant(offset, bits)})" if offset else text

    # Results ----------------------------------------------------------------------------------------------------------

    def put(self, target: str, expression: str) -> None:
        """Assigns an unsigned (or bool) array of the width of the register to the active threads."""
        if target != "_":
            register = f"R[{self.kernel.registers[target]}]"
            kept = expression if self.active == "None" else f"np.where({self.active}, {expression}, {register})"
            self.lines.append(f"{register} = {kept}")

    def put_typed(self, target: str, expression: str, kind: str) -> None:
        """From the numpy dtype of a PTX type to the register, extended as the type says."""
        if kind == "pred":
            return self.put(target, expression)
        bits, have, sign = self.width(target), bits_of(kind), kind[0]
        if kind in ("bf16", "f16"):
            expression, sign = f"to_{kind}({expression})", "u"
        elif sign == "f":
            expression, sign = f"({expression}).view(U{have})", "u"
        if sign == "s":
            extended = expression if have == bits else f"({expression}).astype(I{bits})"
            return self.put(target, f"({extended}).view(U{bits})")
        self.put(target, expression if have == bits else f"({expression}).astype(U{bits})")

    def put_all(self, targets: str, found: str) -> None:
        """The rows of ``found`` to the registers of "{%r1, %r2}"."""
        self.lines.append(f"x = {found}")
        for i, target in enumerate(names_of(targets)):
            self.put(target, f"x[{i}]")


def names_of(operand: str) -> list[str]:
    return split_operands(operand[1:-1]) if operand.startswith("{") else [operand]


def immediate(text: str, bits: int) -> int:
    """The bits of a literal."""
    if text[:2].lower() in ("0f", "0d"):
        return int(text[2:], 16)
    if re.match(r"^-?(0x[0-9a-fA-F]+|\d+)U?$", text):
        return int(text.rstrip("U"), 0)
    if re.match(r"^-?\d*\.\d*(e-?\d+)?$", text) and bits in (32, 64):
        return int.from_bytes(struct.pack("<f" if bits == 32 else "<d", float(text)), "little")
    raise Unsupported(f"operand {text}")
