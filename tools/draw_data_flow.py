"""Draws the data flow of the layer: ``python tools/draw_data_flow.py`` writes docs/_static/data_flow.svg.

Boxes are filled and carry dark text; what stands outside of them is of a grey that shows on white and on black, so that
one picture does for light and dark pages.
"""

from __future__ import annotations

from pathlib import Path

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "_static" / "data_flow.svg"
WIDTH, HEIGHT = 980, 408
GREY = "#7c8087"
KINDS = {
    "shared": ("#dbe7f5", "#4a7ab5", "linear layer"),
    "routed": ("#fde6c8", "#c77d1a", "routed: each token takes one of n"),
    "attention": ("#d9f0dc", "#3f9150", "linear attention, per head"),
    "convolution": ("#eadcf5", "#8a58b3", "depth-wise convolution on the grid"),
}
"""Fill, border and meaning of a kind of box."""


def box(kind: str, x: int, y: int, width: int, height: int, title: str, note: str = "") -> str:
    """A box with its top left corner at (x, y), a formula, and a smaller line below it."""
    fill, border, _ = KINDS[kind]
    middle, centre = x + width // 2, y + height // 2
    lines = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{fill}" stroke="{border}"/>',
        f'<text class="formula" x="{middle}" y="{centre - 2 if note else centre + 5}">{title}</text>',
    ]
    if note:
        lines.append(f'<text class="note" x="{middle}" y="{centre + 15}">{note}</text>')
    return "\n".join(lines)


def arrow(*points: tuple[int, int]) -> str:
    """A line through the points, with a head at the last."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" marker-end="url(#head)"/>'


def outside(x: int, y: int, text: str, name: str) -> str:
    return f'<text class="{name}" x="{x}" y="{y}">{text}</text>'


def moved(letter: str, index: str, by: int) -> str:
    """A letter and its index, so many pixels below the line (above where negative)."""
    return f'{letter}<tspan dy="{by}" font-size="75%">{index}</tspan><tspan dy="{-by}">\u200b</tspan>'


def sub(letter: str, index: str) -> str:
    return moved(letter, index, 4)


def sup(letter: str, index: str) -> str:
    return moved(letter, index, -5)


def stages() -> list[str]:
    """The boxes, column by column, and the arrows between them."""
    out = [box("shared", 10, 158, 60, 44, "x", "N × d")]
    for y, name in ((34, "Q"), (158, "K")):
        out += [
            box("shared", 120, y, 150, 44, f"{name} = x W", "one for all tokens"),
            box("routed", 120, y + 52, 150, 44, f"{name}′ = x {sub('W', 'u')}", f"1 of {sub('n', 'P')} projectors"),
            box("routed", 315, y, 140, 96, sup(f"ReLU({name})", "γ"),
                f"1 of {sub('n', 'F')} powers γ"),
            box("routed", 500, y, 140, 96, f"{name} − λ {name}′", f"1 of {sub('n', 'D')} factors λ"),
            arrow((270, y + 22), (312, y + 22)),
            arrow((270, y + 74), (312, y + 74)),
            arrow((455, y + 22), (497, y + 22)),
            arrow((455, y + 74), (497, y + 74)),
        ]  # fmt: skip
    out += [
        box("shared", 120, 282, 150, 44, "V = x W", "one for all tokens"),
        box("attention", 690, 158, 130, 96, f"S = {sup('K', 'T')}V", "d/H × d/H per head"),
        box("attention", 690, 34, 130, 96, "O = Q S / N", "N × d"),
        box("convolution", 690, 282, 130, 44, "DWC(V)", "3 × 3 neighbours"),
        box("shared", 885, 158, 84, 44, "y = (·) W", "N × d"),
    ]
    fan = [arrow((95, 180), (95, y), (117, y)) for y in (56, 108, 232, 304)]
    out += [
        '<polyline points="70,180 95,180"/>',
        *fan,
        arrow((95, 180), (117, 180)),
        arrow((640, 82), (687, 82)),
        arrow((640, 190), (687, 190)),
        arrow((270, 304), (687, 304)),
        arrow((663, 304), (663, 228), (687, 228)),
        arrow((755, 158), (755, 133)),
        arrow((820, 82), (852, 82), (852, 168)),
        arrow((820, 304), (852, 304), (852, 192)),
        arrow((862, 180), (882, 180)),
        f'<circle cx="852" cy="180" r="10" fill="#ffffff" stroke="{GREY}" stroke-width="1.6"/>',
        '<text class="formula" x="852" y="185">+</text>',
    ]
    return out


def headings() -> list[str]:
    """What each column does above it, and the names of the modules below."""
    columns = [
        (195, "project", "qkv, projection_q, projection_k"),
        (385, "measure", "measure"),
        (570, "subtract", "differential"),
        (755, "attend, convolve", "dwc"),
        (927, "project out", "proj"),
    ]
    out = []
    for x, does, modules in columns:
        out += [outside(x, 20, does, "heading"), outside(x, 352, modules, "module")]
    return out


def legend() -> list[str]:
    out, x = [], 90
    for fill, border, meaning in KINDS.values():
        out.append(f'<rect x="{x}" y="378" width="14" height="14" rx="3" fill="{fill}" stroke="{border}"/>')
        out.append(f'<text class="meaning" x="{x + 20}" y="390">{meaning}</text>')
        x += 46 + 7 * len(meaning)
    return out


def draw() -> str:
    """The whole picture, as SVG."""
    body = "\n".join([*headings(), *stages(), *legend()])
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" {size} \
role="img" aria-labelledby="title">
<title id="title">Data flow of DyDiLAttention: from the tokens x through Q, K, V and routed Q′, K′ to y</title>
<style>
text {{ font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; text-anchor: middle }}
.formula {{ font-size: 16px; fill: #1b1f24 }}
.note {{ font-size: 12.5px; fill: #3d444d }}
.heading {{ font-size: 14px; font-weight: 600; fill: {GREY} }}
.module {{ font-size: 12.5px; font-family: ui-monospace, Menlo, Consolas, monospace; fill: {GREY} }}
.meaning {{ font-size: 13px; text-anchor: start; fill: {GREY} }}
polyline {{ fill: none; stroke: {GREY}; stroke-width: 1.6 }}
</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">\
<path d="M0,0 L8,4 L0,8 z" fill="{GREY}"/></marker></defs>
{body}
</svg>
"""


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
