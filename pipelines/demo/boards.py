"""The demo category: photos of a populated circuit board, drawn by code, with defects and their exact masks.

Every random choice of an image comes from one generator seeded by (seed, split, index), so a rerun gives the same bytes
and a good image is the same whatever else is generated. Defects are drawn here, as a factory would produce them; none
of it is shared with the synthetic anomalies the model is trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi, radians, sin
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from glad_core.errors import GladError
from pipelines.demo.components import GOLD, LAYOUT, WHITE, Colour, Part, part_picture

CATEGORY = "circuit_board"
DEFECTS = ("missing_component", "wrong_component", "scratch", "stain")
SIZE = 256  # pixels of a finished image
CANVAS = 512  # the board is drawn at twice that and averaged down: antialiasing
CHANGED = 10  # grey levels (of 255) by which a defect must change a pixel to count in its mask
BOARD, TRACE, BENCH = (28, 96, 58), (46, 122, 76), (58, 58, 62)
CARD = (26, 26, 486, 486)  # the board's outline on the canvas
# What a careless hand puts in a part's place; a part is else mounted turned.
MISTAKEN_FOR = {
    "capacitor": ("small_capacitor", "chip"),
    "small_capacitor": ("led", "capacitor"),
    "led": ("blue_led", "small_capacitor"),
    "crystal": ("resistor", "chip_resistor"),
    "resistor": ("crystal",),
    "ic": ("chip", "connector"),
    "chip": ("ic", "capacitor"),
    "chip_resistor": ("led",),
}


@lru_cache
def _bare_board() -> Image.Image:
    """The board without components: bench, solder mask, traces, vias, pads and silkscreen."""
    board = Image.new("RGB", (CANVAS, CANVAS), BENCH)
    draw = ImageDraw.Draw(board)
    draw.rounded_rectangle(CARD, 14, fill=BOARD)
    for line in (
        [(84, 92), (84, 200), (120, 236), (120, 320)],
        [(150, 128), (150, 66), (330, 66), (388, 122)],
        [(222, 224), (222, 250), (300, 250), (330, 290)],
        [(252, 160), (300, 160), (300, 192), (344, 236), (378, 270)],
        [(100, 350), (100, 410), (150, 440)],
        [(216, 358), (290, 358), (330, 340)],
        [(378, 374), (378, 440), (320, 440)],
        [(430, 322), (452, 322), (452, 90)],
        [(60, 250), (60, 460)],
    ):
        draw.line(line, fill=TRACE, width=7, joint="curve")
    for x, y in (
        (60, 250),
        (452, 90),
        (452, 220),
        (300, 66),
        (120, 236),
        (300, 250),
        (60, 460),
        (430, 440),
        (400, 440),
    ):
        draw.ellipse((x - 8, y - 8, x + 8, y + 8), fill=GOLD)
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(24, 44, 32))
    for x, y in ((48, 48), (464, 48), (464, 464)):
        draw.ellipse((x - 14, y - 14, x + 14, y + 14), fill=GOLD)
        draw.ellipse((x - 8, y - 8, x + 8, y + 8), fill=BENCH)
    for part in LAYOUT:
        _footprint(draw, part)
    return board


def _footprint(draw: ImageDraw.ImageDraw, part: Part) -> None:
    """Pads and silkscreen outline of one component: what shows where it is missing."""
    x, y, w, h = part.x, part.y, part.width / 2, part.height / 2
    round_part = "capacitor" in part.kind or part.kind == "led"
    (draw.ellipse if round_part else draw.rectangle)(
        (x - w - 5, y - h - 5, x + w + 5, y + h + 5), outline=WHITE, width=3
    )
    for u, v in _pads(part.kind, w, h):
        draw.rectangle((x + u - 5, y + v - 5, x + u + 5, y + v + 5), fill=GOLD)


def _pads(kind: str, w: float, h: float) -> list[tuple[float, float]]:
    """Where a part is soldered, relative to its centre; ``w`` and ``h`` are half its box."""
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


@dataclass(frozen=True)
class Look:
    """All random choices of one photo except its defect: pose of board and components, light, noise."""

    offsets: np.ndarray  # [parts, 2] canvas pixels
    angles: np.ndarray  # [parts] degrees
    shift: np.ndarray  # [2] canvas pixels
    turn: float  # degrees
    gain_HW3: np.ndarray  # float, about 1
    noise_HW3: np.ndarray  # float, grey levels

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Look:
        across, down = np.meshgrid(np.linspace(-1, 1, SIZE), np.linspace(-1, 1, SIZE))
        slope, warmth = rng.uniform(-0.07, 0.07, 2), rng.uniform(-0.04, 0.04)
        light = rng.uniform(0.9, 1.1) * (1 + slope[0] * across + slope[1] * down)
        return cls(
            offsets=rng.uniform(-2.5, 2.5, (len(LAYOUT), 2)),
            angles=rng.uniform(-2, 2, len(LAYOUT)),
            shift=rng.uniform(-7, 7, 2),
            turn=rng.uniform(-2, 2),
            gain_HW3=light[..., None] * np.array([1 + warmth, 1, 1 - warmth]),
            noise_HW3=rng.normal(0, rng.uniform(2.0, 3.5), (SIZE, SIZE, 3)),
        )


def _populate(parts: list[tuple[Part, str | None, float]], look: Look) -> Image.Image:
    """The canvas with each (place, kind mounted there or None, extra turn in degrees)."""
    board, shadow = _bare_board().copy(), Image.new("L", (CANVAS, CANVAS), 0)
    placed: list[tuple[Image.Image, tuple[int, int]]] = []
    for (part, kind, turn), offset, angle in zip(parts, look.offsets, look.angles, strict=True):
        if kind is None:
            continue
        tile = part_picture(kind).rotate(turn + angle, Image.Resampling.BICUBIC, expand=True)
        corner = round(part.x + offset[0] - tile.width / 2), round(part.y + offset[1] - tile.height / 2)
        placed.append((tile, corner))
        shadow.paste(150, (corner[0] + 5, corner[1] + 7), tile.getchannel("A"))
    board.paste((8, 14, 10), (0, 0), shadow.filter(ImageFilter.BoxBlur(4)))
    for tile, corner in placed:
        board.paste(tile, corner, tile)
    return board


def _scratch(rng: np.random.Generator, board: Image.Image) -> Image.Image:
    """A thin, slightly bent bright scratch with a dark edge."""
    length, heading, bend = rng.uniform(70, 170), rng.uniform(0, 2 * pi), rng.uniform(-0.5, 0.5)
    x, y = rng.uniform(110, 400, 2)
    points = []
    for step in np.linspace(-0.5, 0.5, 12):
        way = heading + bend * step
        points.append((x + length * step * cos(way), y + length * step * sin(way)))
    width = int(rng.integers(4, 7))
    draw = ImageDraw.Draw(board)
    draw.line([(px + 2, py + 2) for px, py in points], fill=(20, 40, 28), width=width, joint="curve")
    draw.line(points, fill=tuple(int(c) for c in rng.uniform(175, 235) * np.array([1, 0.97, 0.88])), width=width - 1)
    return board


def _stain(rng: np.random.Generator, board: Image.Image) -> Image.Image:
    """A half-transparent blob with an uneven rim: flux residue, corrosion or oil."""
    x, y = rng.uniform(90, 420, 2)
    radius, opacity = rng.uniform(24, 52), rng.uniform(0.5, 0.8)
    waves = rng.uniform(-0.16, 0.16, (2, 4))
    colours: list[Colour] = [(196, 184, 120), (120, 84, 40), (40, 34, 30), (210, 214, 210)]
    outline = []
    for angle in np.linspace(0, 2 * pi, 60, endpoint=False):
        wobble = sum(waves[0, k] * cos((k + 1) * angle) + waves[1, k] * sin((k + 1) * angle) for k in range(4))
        outline.append((x + radius * (1 + wobble) * cos(angle), y + radius * (1 + wobble) * sin(angle)))
    cover = Image.new("L", board.size, 0)
    ImageDraw.Draw(cover).polygon(outline, fill=int(255 * opacity))
    board.paste(colours[rng.integers(len(colours))], (0, 0), cover.filter(ImageFilter.BoxBlur(5)))
    return board


def _photograph(board: Image.Image, look: Look) -> np.ndarray:
    """The canvas seen by the camera, before light and noise: posed and averaged down, float [SIZE, SIZE, 3]."""
    c, s, middle = cos(radians(look.turn)), sin(radians(look.turn)), CANVAS / 2
    dx, dy = middle + look.shift[0], middle + look.shift[1]
    inverse = (c, s, middle - c * dx - s * dy, -s, c, middle + s * dx - c * dy)
    posed = board.transform(board.size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR, fillcolor=BENCH)
    return np.asarray(posed.reduce(CANVAS // SIZE), dtype=np.float64)


def _choose(rng: np.random.Generator, defect: str) -> list[tuple[Part, str | None, float]]:
    """The components of a board with one of them missing or wrong."""
    parts: list[tuple[Part, str | None, float]] = [(part, part.kind, 0.0) for part in LAYOUT]
    if defect == "missing_component":
        victim = int(rng.integers(len(parts)))
        parts[victim] = (LAYOUT[victim], None, 0.0)
    if defect == "wrong_component":
        victim = int(rng.choice([k for k, part in enumerate(LAYOUT) if part.kind in MISTAKEN_FOR]))
        part = LAYOUT[victim]
        round_part = "capacitor" in part.kind or part.kind == "led"
        if round_part or rng.random() < 0.5:
            parts[victim] = (part, str(rng.choice(MISTAKEN_FOR[part.kind])), 0.0)
        else:
            parts[victim] = (part, part.kind, float(rng.choice([-1, 1]) * rng.uniform(25, 90)))
    return parts


def make_board(rng: np.random.Generator, defect: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """One photo of the board.

    Args:
        rng: source of every random choice; the good part of the picture does not depend on ``defect``.
        defect: one of `DEFECTS`, or None for a good board.

    Returns:
        The image, uint8 [256, 256, 3], and its mask, bool [256, 256]: the pixels the defect changed by more than
        `CHANGED` grey levels before light and noise; all False for a good board.

    Raises:
        ValueError: ``defect`` is not one of `DEFECTS`.
    """
    if defect is not None and defect not in DEFECTS:
        raise ValueError(f"no defect '{defect}': choose one of {', '.join(DEFECTS)}")
    look = Look.draw(rng)
    good = _photograph(_populate([(part, part.kind, 0.0) for part in LAYOUT], look), look)
    photo = good
    while defect is not None and not _visible(photo, good):
        board = _populate(_choose(rng, defect), look)
        if defect == "scratch":
            board = _scratch(rng, board)
        if defect == "stain":
            board = _stain(rng, board)
        photo = _photograph(board, look)
    image = np.clip(photo * look.gain_HW3 + look.noise_HW3, 0, 255).round().astype(np.uint8)
    return image, _changed(photo, good)


def _changed(photo: np.ndarray, good: np.ndarray) -> np.ndarray:
    return np.abs(photo - good).max(axis=2) > CHANGED


def _visible(photo: np.ndarray, good: np.ndarray) -> bool:
    """Whether a defect changed enough pixels for a person to see: a dark stain on a black body may not."""
    return int(_changed(photo, good).sum()) >= 60


def board_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """The generator of image ``index`` of ``split`` ('train', 'good' or a defect)."""
    return np.random.default_rng([seed, ("train", "good", *DEFECTS).index(split), index])


def make_demo_data(out: Path, seed: int = 0, train_good: int = 200, test_good: int = 20, per_defect: int = 10) -> Path:
    """Write the demo category as an MVTec-AD tree and return its folder, ``out``/circuit_board.

    Existing files of the same names are replaced; the same arguments write the same bytes.

    Raises:
        GladError: ``out`` cannot be written.
    """
    root = Path(out) / CATEGORY
    try:
        _draw(root, seed, train_good, test_good, per_defect)
    except OSError as error:
        raise GladError(f"{out}: {error.strerror or error}; choose a folder that can be written") from error
    return root


def _draw(root: Path, seed: int, train_good: int, test_good: int, per_defect: int) -> None:
    for split, folder, count in (
        ("train", "train/good", train_good),
        ("good", "test/good", test_good),
        *((defect, f"test/{defect}", per_defect) for defect in DEFECTS),
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        if split in DEFECTS:
            (root / "ground_truth" / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image, mask = make_board(board_rng(seed, split, index), split if split in DEFECTS else None)
            Image.fromarray(image).save(root / folder / f"{index:03d}.png")
            if split in DEFECTS:
                Image.fromarray(mask).save(root / "ground_truth" / split / f"{index:03d}_mask.png")
