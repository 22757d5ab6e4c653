"""The demo's circuit board without its components."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from pipelines.demo.components import CANVAS, GOLD, LAYOUT, WHITE, Part

SOLDER_MASK, TRACE, BENCH = (28, 96, 58), (46, 122, 76), (58, 58, 62)
VIA_HOLE = (24, 44, 32)
# On the canvas, in pixels.
OUTLINE = (26, 26, 486, 486)
TRACES = (
    ((84, 92), (84, 200), (120, 236), (120, 320)),
    ((150, 128), (150, 66), (330, 66), (388, 122)),
    ((222, 224), (222, 250), (300, 250), (330, 290)),
    ((252, 160), (300, 160), (300, 192), (344, 236), (378, 270)),
    ((100, 350), (100, 410), (150, 440)),
    ((216, 358), (290, 358), (330, 340)),
    ((378, 374), (378, 440), (320, 440)),
    ((430, 322), (452, 322), (452, 90)),
    ((60, 250), (60, 460)),
)
VIAS = ((60, 250), (452, 90), (452, 220), (300, 66), (120, 236), (300, 250), (60, 460), (430, 440), (400, 440))
MOUNTING_HOLES = ((48, 48), (464, 48), (464, 464))


@lru_cache
def bare_board() -> Image.Image:
    """Bench, solder mask, traces, vias, mounting holes, and the footprints of components. Copy it to draw on it."""
    board = Image.new("RGB", (CANVAS, CANVAS), BENCH)
    draw = ImageDraw.Draw(board)
    draw.rounded_rectangle(OUTLINE, 14, fill=SOLDER_MASK)
    for trace in TRACES:
        draw.line(trace, fill=TRACE, width=7, joint="curve")
    for x, y in VIAS:
        draw.ellipse((x - 8, y - 8, x + 8, y + 8), fill=GOLD)
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=VIA_HOLE)
    for x, y in MOUNTING_HOLES:
        draw.ellipse((x - 14, y - 14, x + 14, y + 14), fill=GOLD)
        draw.ellipse((x - 8, y - 8, x + 8, y + 8), fill=BENCH)
    for part in LAYOUT:
        _footprint(draw, part)
    return board


def _footprint(draw: ImageDraw.ImageDraw, part: Part) -> None:
    """Outline and pads of one component, which show if it is missing."""
    x, y, w, h = part.x, part.y, part.width / 2, part.height / 2
    outline = draw.ellipse if part.is_round else draw.rectangle
    outline((x - w - 5, y - h - 5, x + w + 5, y + h + 5), outline=WHITE, width=3)
    for u, v in _pads(part.kind, w, h):
        draw.rectangle((x + u - 5, y + v - 5, x + u + 5, y + v + 5), fill=GOLD)


def _pads(kind: str, w: float, h: float) -> list[tuple[float, float]]:
    """Positions where a component is soldered, from its centre; ``w`` and ``h`` are half its width and height."""
    row = np.linspace(-1, 1, 7)
    if kind == "ic":
        return [((w - 12) * k, side * (h - 8)) for k in row for side in (-1, 1)]
    if kind == "chip":
        sides = [((w - 20) * k, side * (h - 6)) for k in row for side in (-1, 1)]
        return sides + [(v, u) for u, v in sides]
    if kind == "connector":
        return [((w - 20) * k, 3) for k in np.linspace(-1, 1, 6)]
    if kind == "chip_resistor":
        return [(0, 8 - h), (0, h - 8)]
    return [(-w / 2, 0), (w / 2, 0)] if "capacitor" in kind or kind == "led" else [(8 - w, 0), (w - 8, 0)]
