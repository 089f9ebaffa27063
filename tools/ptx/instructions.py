"""PTX instructions as Python: memory, warps, tensor cores, moves and integers.

Each function writes the lines for the instructions whose opcode begins as its decorator says; those of floating-point
numbers are in :mod:`tools.ptx.floating`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tools.ptx import approximate, arrays, numbers
from tools.ptx.arrays import Unsupported
from tools.ptx.floating import COMPARISONS, FLOATING, convert, floating_point, packed, packed_f32, unordered
from tools.ptx.parsing import Block, Instruction, Kernel, bits_of
from tools.ptx.writer import Writer, names_of

SCOPE: dict[str, Any] = {"np": np, **vars(arrays), **vars(numbers), **vars(approximate)}
"""The names that the written code uses."""
Emit = Callable[[Writer, Instruction, int], None]
EMITS: dict[str, Emit] = {}
"""Opcode -> what writes it; the last argument is the number of the instruction."""


def emits(*heads: str) -> Callable[[Emit], Emit]:
    def add(emit: Emit) -> Emit:
        EMITS.update(dict.fromkeys(heads, emit))
        return emit

    return add


def function_of(kernel: Kernel, block: Block, masked: bool) -> Callable[..., None]:
    """The Python of a block, see :mod:`tools.ptx.writer`; raises Unsupported, naming the instruction."""
    writer = Writer(kernel, masked)
    for instruction in block.body:
        try:
            write(writer, instruction)
        except (Unsupported, KeyError, IndexError, ValueError) as error:
            place = instruction.place
            raise Unsupported(f"{kernel.name}, PTX line {place.line}: {place.text}: {error!r}") from error
    body = "\n    ".join(writer.lines) or "pass"
    scope = dict(SCOPE)
    exec(compile(f"def block(R, K, M, act):\n    {body}\n", f"<{kernel.name} block {block.index}>", "exec"), scope)
    function: Callable[..., None] = scope["block"]
    return function


def write(w: Writer, i: Instruction) -> None:
    ip, kind = w.begin(i), i.parts[-1]
    if i.parts[0] in EMITS:
        EMITS[i.parts[0]](w, i, ip)
    elif kind == "f32x2":
        packed_f32(w, i)
    elif kind in ("bf16x2", "f16x2"):
        packed(w, i)
    elif kind in FLOATING:
        floating_point(w, i)
    else:
        integer(w, i)


# Memory ---------------------------------------------------------------------------------------------------------------


def space_of(i: Instruction) -> tuple[str, int]:
    """Global or shared, and the bits of an address there."""
    for space, bits in (("global", 64), ("shared", 32)):
        if space in i.parts:
            return space, bits
    raise Unsupported("address space")


@emits("ld")
def load(w: Writer, i: Instruction, ip: int) -> None:
    kind, targets = i.parts[-1], names_of(i.operands[0])
    bits = bits_of(kind)
    if "param" in i.parts:
        found = re.match(r"^\[\s*([\w$]+)\s*(?:\+\s*(\d+))?\s*\]$", i.operands[1])
        if found is None:
            raise Unsupported(i.operands[1])
        number, shift = w.kernel.parameters[found[1]][0], 8 * int(found[2] or 0)
        for j, target in enumerate(targets):
            value = f"(M.arguments[{number}] >> {shift + j * bits}) & {(1 << bits) - 1}"
            w.put(target, f"np.full(M.t, {value}, U{w.width(target)})")
        return
    space, address_bits = space_of(i)
    address = w.address(i.operands[1], address_bits)
    w.lines.append(f"x = M.load_{space}({address}, {w.active}, {bits // 8}, {len(targets)}, {ip})")
    for j, target in enumerate(targets):
        if target != "_":
            have = w.width(target)
            signed = f"x[{j}].view(I{bits}).astype(I{have}).view(U{have})"
            w.put(target, f"x[{j}]" if have == bits else signed if kind[0] == "s" else f"x[{j}].astype(U{have})")


@emits("st")
def store(w: Writer, i: Instruction, ip: int) -> None:
    bits, (space, address_bits) = bits_of(i.parts[-1]), space_of(i)
    sources = names_of(i.operands[1])
    values = [w.raw(x, w.width(x) if x in w.kernel.registers else max(16, bits)) for x in sources]
    address = w.address(i.operands[0], address_bits)
    w.lines.append(f"M.store_{space}({address}, {w.active}, {bits // 8}, [{', '.join(values)}], {ip})")


@emits("atom", "red")
def atomic(w: Writer, i: Instruction, ip: int) -> None:
    operation = next(part for part in i.parts if part in ("add", "max", "min", "exch", "cas", "and", "or"))
    kind, at = i.parts[-1], 1 if i.parts[0] == "atom" else 0
    address, value = w.address(i.operands[at], 64), w.raw(i.operands[at + 1], bits_of(kind))
    w.lines.append(f"x = M.atomic({operation!r}, {kind!r}, {address}, {value}, {w.active}, {ip})")
    if at:
        w.put(i.operands[0], "x")


@emits("cp")
def copy(w: Writer, i: Instruction, ip: int) -> None:
    parts, ops = i.parts, i.operands
    if parts[1] != "async" or "bulk" in parts or "mbarrier" in parts:
        raise Unsupported(i.op)
    if "wait_group" in parts or "wait_all" in parts:
        w.lines.append(f"M.wait({int(ops[0]) if 'wait_group' in parts else None}, {w.active})")
    elif "commit_group" in parts:
        w.lines.append(f"M.commit({w.active})")
    else:
        length = w.raw(ops[3], 32) if len(ops) > 3 else "None"
        to, source = w.address(ops[0], 32), w.address(ops[1], 64)
        w.lines.append(f"M.cp_async({to}, {source}, {w.active}, {int(ops[2], 0)}, {length}, {ip})")


# Warps and tensor cores -----------------------------------------------------------------------------------------------


@emits("fence")
def fence(w: Writer, i: Instruction, ip: int) -> None:
    """Memory is in order as it is."""


@emits("bar")
def warp_barrier(w: Writer, i: Instruction, ip: int) -> None:
    if i.parts[1] != "warp":
        raise Unsupported(i.op)
    w.lines.append(f"M.pass_warp_barrier({w.active}, {ip})")


@emits("ldmatrix")
def load_matrix(w: Writer, i: Instruction, ip: int) -> None:
    targets, address = i.operands[0], w.address(i.operands[1], 32)
    w.put_all(targets, f"M.ldmatrix({address}, {w.active}, {len(names_of(targets))}, {'trans' in i.parts}, {ip})")


@emits("stmatrix")
def store_matrix(w: Writer, i: Instruction, ip: int) -> None:
    address, values = w.address(i.operands[0], 32), w.registers(i.operands[1])
    w.lines.append(f"M.stmatrix({address}, {w.active}, {values}, {'trans' in i.parts}, {ip})")


MMA = {("m16n8k16", "bf16"): 4, ("m16n8k16", "f16"): 4, ("m16n8k8", "tf32"): 4, ("m16n8k8", "bf16"): 2,
       ("m16n8k8", "f16"): 2}  # fmt: skip
"""Shape and type -> registers of the first operand."""


@emits("mma")
def matrix_product(w: Writer, i: Instruction, ip: int) -> None:
    shape = next(part for part in i.parts if part.startswith("m16"))
    result, kind, _, sums = i.parts[i.parts.index("col") + 1 :][:4]
    if (result, sums) != ("f32", "f32") or MMA[shape, kind] != len(names_of(i.operands[1])):
        raise Unsupported(i.op)
    a, b, c = (w.registers(x) for x in i.operands[1:4])
    w.put_all(i.operands[0], f"M.mma({kind!r}, {a}, {b}, {c}, {w.active}, {ip})")


@emits("wgmma")
def warpgroup_product(w: Writer, i: Instruction, ip: int) -> None:
    parts, ops = i.parts, i.operands
    if parts[1] == "fence":
        return
    if parts[1] == "commit_group":
        w.lines.append(f"M.wgmma_commit({w.active}, {ip})")
    elif parts[1] == "wait_group":
        w.lines.append(f"M.wgmma_wait({int(ops[0])}, {w.active}, {ip})")
    else:
        found, kind = re.match(r"m64n(\d+)k(\d+)$", parts[4]), parts[6]
        if parts[1] != "mma_async" or found is None or parts[5] != "f32" or [int(x) for x in ops[4:6]] != [1, 1]:
            raise Unsupported(i.op)
        flags = [bool(int(x)) for x in ops[6:]]  # transposed operands, of those in shared memory
        a = w.raw(ops[1], 64)
        if ops[1].startswith("{"):
            a, flags = w.registers(ops[1]), [False, *flags]
        transposed = (False, False) if kind == "tf32" else tuple(flags)
        w.put_all(ops[0], f"M.wgmma({found[1]}, {found[2]}, {kind!r}, {w.registers(ops[0])}, {a}, {w.raw(ops[2], 64)}, "
                          f"{w.predicate(ops[3])}, {transposed}, {w.active}, {ip})")  # fmt: skip


@emits("shfl")
def shuffle(w: Writer, i: Instruction, ip: int) -> None:
    target, _, flag = i.operands[0].partition("|")
    a, b, c = (w.raw(x, 32) for x in i.operands[1:4])
    w.lines.append(f"x = M.shfl({i.parts[2]!r}, {a}, {b}, {c}, {w.active}, {ip})")
    w.put(target.strip(), "x[0]")
    if flag:
        w.put(flag.strip(), "x[1]")


@emits("redux")
def reduce(w: Writer, i: Instruction, ip: int) -> None:
    w.put(i.operands[0], f"M.redux({i.parts[2]!r}, {w.value(i.operands[1], i.parts[-1])}, {w.active}, {ip}).view(U32)")


@emits("vote")
def vote(w: Writer, i: Instruction, ip: int) -> None:
    p = w.predicate(i.operands[1])
    if i.parts[2] == "ballot":
        w.put(i.operands[0], f"M.ballot({p}{' & act' if w.masked else ''}, {w.active}, {ip})")
    else:
        w.put(i.operands[0], f"M.vote({i.parts[2]!r}, {p}, {w.active}, {ip})")


@emits("match")
def match(w: Writer, i: Instruction, ip: int) -> None:
    w.put(i.operands[0], f"M.match_any({w.raw(i.operands[1], 32)}, {w.active}, {ip})")


# Moves and predicates -------------------------------------------------------------------------------------------------


@emits("mov")
def move(w: Writer, i: Instruction, ip: int) -> None:
    target, source, kind = i.operands[0], i.operands[1], i.parts[-1]
    if kind == "pred":
        w.put(target, w.predicate(source))
    elif target.startswith("{"):
        targets, bits = names_of(target), bits_of(kind)
        each = bits // len(targets)
        w.lines.append(f"x = {w.raw(source, bits)}")
        for j, name in enumerate(targets):
            w.put(name, f"(x >> U{bits}({j * each})).astype(U{each})")
    else:
        w.put(target, w.raw(source, w.width(target)))


@emits("cvt")
def conversion(w: Writer, i: Instruction, ip: int) -> None:
    convert(w, i)


@emits("setp")
def set_predicate(w: Writer, i: Instruction, ip: int) -> None:
    """The relation of two operands, or that joined with a predicate; and its opposite where there is a place for it."""
    target, _, other = i.operands[0].partition("|")
    relation, kind = i.parts[1], i.parts[-1]
    a, b = w.value(i.operands[1], kind), w.value(i.operands[2], kind)
    if kind in FLOATING:
        w.lines.append(f"x = {unordered(relation, a, b)}")
    else:
        w.lines.append(f"x = {a} {COMPARISONS[relation]} {b}")
    joined = "{}"
    if len(i.operands) > 3:
        sign = {"and": "&", "or": "|", "xor": "^"}[i.parts[2]]
        w.lines.append(f"y = {w.predicate(i.operands[3])}")
        joined = f"{{}} {sign} y"
    w.put(target.strip(), joined.format("x"))
    if other:
        w.put(other.strip(), joined.format("(~x)"))


@emits("selp")
def select(w: Writer, i: Instruction, ip: int) -> None:
    bits = w.width(i.operands[0])
    a, b = w.raw(i.operands[1], bits), w.raw(i.operands[2], bits)
    w.put(i.operands[0], f"np.where({w.predicate(i.operands[3])}, {a}, {b})")


@emits("and", "or", "xor", "not")
def logic(w: Writer, i: Instruction, ip: int) -> None:
    sign = {"and": "&", "or": "|", "xor": "^", "not": "~"}[i.parts[0]]
    if i.parts[-1] == "pred":
        values = [w.predicate(x) for x in i.operands[1:]]
    else:
        values = [w.raw(x, w.width(i.operands[0])) for x in i.operands[1:]]
    w.put(i.operands[0], f"~{values[0]}" if sign == "~" else f" {sign} ".join(values))


# Integers -------------------------------------------------------------------------------------------------------------

INTEGER = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "min": "np.minimum({0}, {1})", "max": "np.maximum({0}, {1})",
    "div": "div_int({0}, {1})", "rem": "rem_int({0}, {1})", "neg": "-{0}", "abs": "np.abs({0})", "brev": "brev({0})",
}  # fmt: skip
"""Operands and result of one type."""


def integer(w: Writer, i: Instruction) -> None:
    head, kind, ops = i.parts[0], i.parts[-1], i.operands
    allowed = ("lo", "hi", "wide") if head in ("mul", "mad") else ("l", "r", "wrap", "clamp") if head == "shf" else ()
    if strange := [part for part in i.parts[1:-1] if part not in allowed]:
        raise Unsupported(f"modifiers {strange}")
    bits = bits_of(kind)
    if head in INTEGER:
        values = [w.value(x, kind) for x in ops[1:]]
        if len(values) != INTEGER[head].count("{"):
            raise Unsupported(f"{len(ops)} operands")
        w.put_typed(ops[0], INTEGER[head].format(*values), kind)
    elif head in ("mul", "mad"):
        multiply(w, i, bits)
    elif head == "shl":
        w.put(ops[0], f"{w.raw(ops[1], bits)} << {w.raw(ops[2], 32)}.astype(U{bits})")
    elif head == "shr" and kind[0] == "s":
        amount = f"np.minimum({w.raw(ops[2], 32)}, U32({bits - 1})).astype(I{bits})"
        w.put(ops[0], f"({w.value(ops[1], kind)} >> {amount}).view(U{bits})")
    elif head == "shr":
        w.put(ops[0], f"{w.raw(ops[1], bits)} >> {w.raw(ops[2], 32)}.astype(U{bits})")
    elif head == "shf":
        a, b, c = (w.raw(x, 32) for x in ops[1:])
        w.put(ops[0], f"funnel_shift({a}, {b}, {c}, {'l' in i.parts}, {'wrap' in i.parts})")
    elif head == "prmt":
        w.put(ops[0], f"prmt({', '.join(w.raw(x, 32) for x in ops[1:])})")
    elif head == "lop3":
        w.put(ops[0], f"lop3({', '.join(w.raw(x, 32) for x in ops[1:4])}, {int(ops[4].rstrip('U'), 0)})")
    elif head == "bfe":
        w.put(ops[0], f"bfe({w.value(ops[1], kind)}, {w.raw(ops[2], 32)}, {w.raw(ops[3], 32)}).view(U{bits})")
    elif head in ("popc", "clz"):
        w.put(ops[0], f"{head}({w.raw(ops[1], bits)})")
    else:
        raise Unsupported("instruction")


def multiply(w: Writer, i: Instruction, bits: int) -> None:
    kind, ops = i.parts[-1], i.operands
    a, b = w.value(ops[1], kind), w.value(ops[2], kind)
    if "wide" in i.parts:
        bits, wide = 2 * bits, f"{'I' if kind[0] == 's' else 'U'}{2 * bits}"
        product = f"({a}.astype({wide}) * {b}.astype({wide})).view(U{bits})"
    else:
        product = (f"mul_hi({a}, {b})" if "hi" in i.parts else f"({a} * {b})") + f".view(U{bits})"
    w.put(ops[0], f"{product} + {w.raw(ops[3], bits)}" if i.parts[0] == "mad" else product)
