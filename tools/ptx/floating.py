"""PTX instructions of floating-point numbers as Python: arithmetic, comparisons, conversions."""

from __future__ import annotations

from tools.ptx.arrays import Unsupported
from tools.ptx.parsing import Instruction, bits_of
from tools.ptx.writer import Writer

FLOATING = ("f16", "bf16", "f32", "f64")
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
               "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}  # fmt: skip
SIGNS = {"add": "+", "sub": "-", "mul": "*"}
ROUNDINGS = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}


def unordered(relation: str, a: str, b: str) -> str:
    """A comparison: false for NaN, or true where the relation ends in u."""
    if relation in ("num", "nan"):
        return f"{'~' if relation == 'num' else ''}(np.isnan({a}) | np.isnan({b}))"
    if relation == "ne":
        return f"({a} < {b}) | ({a} > {b})"
    if relation in ("eq", "lt", "le", "gt", "ge"):
        return f"{a} {COMPARISONS[relation]} {b}"
    if relation == "equ":
        return f"~(({a} < {b}) | ({a} > {b}))"
    if relation == "neu":
        return f"{a} != {b}"
    opposite = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}[relation]
    return f"~({a} {opposite} {b})"


def operation(head: str, parts: list[str], x: list[str]) -> str | None:
    """Of float32 operands, exact but for the last rounding; None for others."""
    if head in SIGNS:
        return f"{x[0]} {SIGNS[head]} {x[1]}"
    if head == "fma":
        return f"fma32({x[0]}, {x[1]}, {x[2]})"
    if head in ("min", "max"):
        function = f"np.{head}imum" if "NaN" in parts else f"np.f{head}"
        found = f"{function}({x[0]}, {x[1]})"
        return f"{function}({found}, {x[2]})" if len(x) == 3 else found  # of three, on sm_100 and later
    if head == "neg":
        return f"-{x[0]}"
    if head == "abs":
        return f"np.abs({x[0]})"
    return None


def floating_point(w: Writer, i: Instruction) -> None:
    parts, ops = i.parts, i.operands
    head, kind = parts[0], parts[-1]
    unknown, narrow = set(parts[1:-1]) - {"rn", "ftz", "approx", "full", "NaN"}, ""
    if unknown == {"f32"} and kind in ("bf16", "f16") and head in ("add", "sub", "fma"):
        # The last operand and the result are float32, the others narrow.
        narrow, kind, unknown = kind, "f32", set()
    if unknown or (head == "fma" and kind == "f64"):
        raise Unsupported(i.op)
    if head == "neg" and kind in ("bf16", "f16"):
        return w.put(ops[0], f"{w.raw(ops[1], 16)} ^ U16(0x8000)")
    flush = "ftz" in parts
    kinds = [narrow or kind] * (len(ops) - 2) + [kind]
    x = [w.value(operand, k) for operand, k in zip(ops[1:], kinds, strict=True)]
    x = [f"ftz({a})" for a in x] if flush else x
    found = operation(head, parts, x)
    if found is None and head == "copysign":
        found = f"np.copysign({x[1]}, {x[0]})"
    elif found is None and kind == "f32" and "rn" in parts:
        exact = {"rcp": "(1.0 / {0}.astype(F64)).astype(F32)", "sqrt": "np.sqrt({0})", "div": "{0} / {1}"}
        found = exact[head].format(*x)
    elif found is None and kind == "f32" and head in ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "div"):
        found = f"{'div_full' if head == 'div' else head}({', '.join(x)})"
    if found is None:
        raise Unsupported("floating point")
    w.put_typed(ops[0], f"ftz({found})" if flush and kind == "f32" else found, kind)


def packed(w: Writer, i: Instruction) -> None:
    """Two numbers of 16 bits at once."""
    kind, halves = i.parts[-1][:-2], []
    if set(i.parts[1:-1]) - {"rn", "NaN"}:
        raise Unsupported(i.op)
    for shift in (0, 16):
        x = [f"from_{kind}(({w.raw(operand, 32)} >> U32({shift})).astype(U16))" for operand in i.operands[1:]]
        found = operation(i.parts[0], i.parts, x)
        if found is None:
            raise Unsupported("packed")
        halves.append(f"to_{kind}({found}).astype(U32)")
    w.put(i.operands[0], f"{halves[0]} | ({halves[1]} << U32(16))")


def packed_f32(w: Writer, i: Instruction) -> None:
    """Two float32 at once."""
    head, halves = i.parts[0], []
    if "ftz" in i.parts or head not in (*SIGNS, "fma"):
        raise Unsupported(i.op)
    for shift in (0, 32):
        x = [f"(({w.raw(operand, 64)}) >> U64({shift})).astype(U32).view(F32)" for operand in i.operands[1:]]
        halves.append(f"({operation(head, i.parts, x)}).view(U32).astype(U64)")
    w.put(i.operands[0], f"{halves[0]} | ({halves[1]} << U64(32))")


# Conversions ----------------------------------------------------------------------------------------------------------


def convert(w: Writer, i: Instruction) -> None:
    parts, ops = i.parts, i.operands
    to, source = parts[-2:]
    if {"sat", "relu", "satfinite"} & set(parts):
        raise Unsupported(i.op)
    if to in ("bf16x2", "f16x2"):
        if "rn" not in parts:
            raise Unsupported(i.op)
        high, low = (f"to_{to[:-2]}({w.value(x, 'f32')}).astype(U32)" for x in ops[1:3])
        w.put(ops[0], f"({high} << U32(16)) | {low}")
    elif to == "tf32":
        if "rna" not in parts:
            raise Unsupported(i.op)
        w.put(ops[0], f"to_tf32({w.raw(ops[1], 32)})")
    elif to in FLOATING and source in FLOATING:
        between_floats(w, i, to, source)
    elif to in FLOATING:
        if "rn" not in parts:
            raise Unsupported(i.op)
        w.put_typed(ops[0], f"{w.value(ops[1], source)}.astype({'F64' if to == 'f64' else 'F32'})", to)
    elif source in FLOATING:
        rounding = next(part for part in parts if part in ROUNDINGS)
        x = f"integer_of({w.value(ops[1], source)}, {rounding!r}, {bits_of(to)}, {to[0] == 's'})"
        w.put_typed(ops[0], x, to)
    else:
        dtype = f"{'I' if to[0] == 's' else 'U'}{bits_of(to)}"
        w.put_typed(ops[0], f"{w.value(ops[1], source)}.astype({dtype})", to)


def between_floats(w: Writer, i: Instruction, to: str, source: str) -> None:
    x, rounding = w.value(i.operands[1], source), next((part for part in i.parts if part in ROUNDINGS), None)
    if to in ("f16", "bf16"):
        x = f"{x}.astype(F32)" if source == "f64" else x
        if "rz" in i.parts and to == "bf16":
            w.put(i.operands[0], f"to_bf16_towards_zero({x})")
        elif "rn" in i.parts:
            w.put_typed(i.operands[0], x, to)
        else:
            raise Unsupported(i.op)
        return
    if "f64" in (to, source):
        x = f"{x}.astype(F{to[1:]})"
    elif rounding:
        x = f"{ROUNDINGS[rounding]}({x})"
    if "ftz" in i.parts:
        x = f"ftz({x})"
    w.put_typed(i.operands[0], x, to)
