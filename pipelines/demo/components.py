"""The components of the demo's circuit board: where each is mounted and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

CANVAS = 512  # pixels; the board is drawn at twice an image's side and averaged down, which smooths its edges
Colour = tuple[int, int, int]
SILVER, DARK, WHITE, GOLD = (198, 200, 204), (34, 35, 38), (225, 228, 222), (205, 168, 86)


@dataclass(frozen=True)
class Part:
    """One component: its kind in `DRAW`, its centre on the canvas, its width and height, in canvas pixels."""

    kind: str
    x: int
    y: int
    width: int
    height: int

    @property
    def is_round(self) -> bool:
        return "capacitor" in self.kind or self.kind == "led"


LAYOUT = (
    Part("ic", 186, 176, 132, 104),
    Part("chip", 378, 322, 104, 104),
    Part("capacitor", 388, 122, 92, 92),
    Part("small_capacitor", 100, 318, 66, 66),
    Part("connector", 230, 440, 190, 48),
    Part("resistor", 232, 284, 130, 30),
    Part("crystal", 216, 358, 84, 36),
    Part("led", 84, 92, 48, 48),
    Part("chip_resistor", 300, 192, 26, 48),
)


def _gradient(tile: Image.Image, low: Colour, high: Colour) -> Image.Image:
    """The shape of ``tile`` filled with a vertical gradient, as if lit from above."""
    ramp = np.linspace(0, 1, tile.height)[:, None, None]
    rows = np.array(high) * (1 - ramp) + np.array(low) * ramp
    fill = Image.fromarray(np.broadcast_to(rows, (tile.height, tile.width, 3)).astype(np.uint8))
    fill.putalpha(tile.getchannel("A"))
    return fill


def _ic(draw: ImageDraw.ImageDraw, w: int, h: int) -> None:
    for k in range(7):
        x = 12 + k * (w - 24) / 6
        draw.rectangle((x - 4, 0, x + 4, h), fill=SILVER)
    draw.rounded_rectangle((2, 14, w - 3, h - 15), 4, fill=DARK)
    draw.rectangle((2, h - 22, w - 3, h - 15), fill=(24, 25, 27))
    draw.ellipse((11, h - 38, 23, h - 26), fill=(120, 120, 122))
    draw.line((34, h / 2 - 8, w - 22, h / 2 - 8), fill=(168, 170, 168), width=5)
    draw.line((34, h / 2 + 6, w - 48, h / 2 + 6), fill=(150, 152, 150), width=4)


def _chip(draw: ImageDraw.ImageDraw, w: int, h: int) -> None:
    for k in range(7):
        pin = 20 + k * (w - 40) / 6
        draw.rectangle((pin - 3, 0, pin + 3, h), fill=SILVER)
        draw.rectangle((0, pin - 3, w, pin + 3), fill=SILVER)
    draw.rounded_rectangle((12, 12, w - 13, h - 13), 5, fill=(42, 42, 47))
    draw.ellipse((20, 20, 32, 32), fill=(150, 150, 154))
    draw.rectangle((34, 44, w - 34, h - 44), outline=(150, 152, 156), width=3)


def _capacitor(draw: ImageDraw.ImageDraw, w: int, h: int, sleeve: Colour = (38, 42, 70)) -> None:
    draw.ellipse((0, 0, w - 1, h - 1), fill=sleeve)
    draw.ellipse((7, 7, w - 8, h - 8), fill=(188, 190, 196))
    draw.chord((7, 7, w - 8, h - 8), 130, 230, fill=sleeve)
    draw.line((w * 0.34, h / 2, w * 0.86, h / 2), fill=(130, 132, 138), width=4)
    draw.line((w * 0.6, h * 0.24, w * 0.6, h * 0.76), fill=(130, 132, 138), width=4)


def _small_capacitor(draw: ImageDraw.ImageDraw, w: int, h: int) -> None:
    _capacitor(draw, w, h, sleeve=(150, 92, 40))


def _connector(draw: ImageDraw.ImageDraw, w: int, h: int) -> None:
    draw.rounded_rectangle((0, 0, w - 1, h - 1), 5, fill=(222, 214, 190))
    draw.rectangle((6, 6, w - 7, 13), fill=(198, 190, 166))
    for k in range(6):
        x = 20 + k * (w - 40) / 5
        draw.rectangle((x - 9, h / 2 - 7, x + 9, h / 2 + 13), fill=(92, 86, 74))
        draw.rectangle((x - 4, h / 2 - 2, x + 4, h / 2 + 8), fill=GOLD)


def _resistor(draw: ImageDraw.ImageDraw, w: int, h: int) -> None:
    draw.line((0, h / 2, w, h / 2), fill=SILVER, width=6)
    draw.rounded_rectangle((22, 0, w - 23, h - 1), 11, fill=(206, 176, 130))
    draw.line((24, 8, w - 25, 8), fill=(228, 204, 164), width=4)
    for x, colour in ((34, (126, 60, 36)), (50, (30, 30, 30)), (66, (190, 52, 40)), (88, (196, 156, 60))):
        draw.rectangle((x, 0, x + 8, h - 1), fill=colour)


def _crystal(draw: ImageDraw.ImageDraw, w: int, h: int) -> None:
    draw.rounded_rectangle((0, 0, w - 1, h - 1), h / 2 - 1, fill=(158, 160, 166))
    draw.rounded_rectangle((5, 5, w - 6, h - 6), h / 2 - 6, fill=(200, 202, 206))
    draw.line((22, h / 2, w - 22, h / 2), fill=(140, 142, 148), width=4)


def _led(draw: ImageDraw.ImageDraw, w: int, h: int, colour: Colour = (196, 40, 38)) -> None:
    draw.ellipse((0, 0, w - 1, h - 1), fill=tuple(int(c * 0.62) for c in colour))
    draw.ellipse((5, 5, w - 6, h - 6), fill=colour)
    draw.ellipse((12, 10, w * 0.5, h * 0.44), fill=tuple(min(255, c + 90) for c in colour))


def _blue_led(draw: ImageDraw.ImageDraw, w: int, h: int) -> None:
    _led(draw, w, h, colour=(60, 130, 226))


def _chip_resistor(draw: ImageDraw.ImageDraw, w: int, h: int) -> None:
    draw.rectangle((0, 0, w - 1, h - 1), fill=SILVER)
    draw.rectangle((0, 11, w - 1, h - 12), fill=(40, 40, 44))
    draw.line((w / 2, 16, w / 2, h - 17), fill=(206, 206, 206), width=4)


DRAW: dict[str, Callable[[ImageDraw.ImageDraw, int, int], None]] = {
    "ic": _ic,
    "chip": _chip,
    "capacitor": _capacitor,
    "small_capacitor": _small_capacitor,
    "connector": _connector,
    "resistor": _resistor,
    "crystal": _crystal,
    "led": _led,
    "blue_led": _blue_led,
    "chip_resistor": _chip_resistor,
}
BOXES = {part.kind: (part.width, part.height) for part in LAYOUT} | {"blue_led": (48, 48)}


@lru_cache
def part_picture(kind: str) -> Image.Image:
    """The RGBA picture of one component."""
    tile = Image.new("RGBA", BOXES[kind], (0, 0, 0, 0))
    DRAW[kind](ImageDraw.Draw(tile), *BOXES[kind])
    if kind == "crystal":
        return _gradient(tile, (128, 130, 136), (224, 226, 230))
    return tile
