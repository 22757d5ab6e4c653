"""The demo dataset: photos of a circuit board, drawn by code, with defects and their exact masks.

Each image has a random generator of its own, seeded by (seed, split, index), so a rerun writes the same bytes and an
image does not depend on the others. The defects share no code with the synthetic anomalies of training: a model meets
them for the first time in the test, as in a factory.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, radians, sin
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from glad_core.errors import GladError
from pipelines.demo.bare_board import BENCH, bare_board
from pipelines.demo.components import CANVAS, LAYOUT, Colour, Part, part_picture

CATEGORY = "circuit_board"
DEFECTS = ("missing_component", "wrong_component", "scratch", "stain")
SIZE = CANVAS // 2  # pixels a side of an image
CHANGED = 10  # grey levels (of 255): a pixel that a defect changes by more belongs to its mask
VISIBLE = 60  # pixels of the mask of a defect that people can see
# What may be mounted by mistake in a component's place.
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


class Mounting(NamedTuple):
    """What is mounted in the place of ``part``: a kind, or None for nothing, turned by ``turn`` degrees."""

    part: Part
    kind: str | None
    turn: float = 0.0


CORRECT = [Mounting(part, part.kind) for part in LAYOUT]


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
        """Random choices, made in a fixed order."""
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


def _populate(mountings: list[Mounting], look: Look) -> Image.Image:
    """The canvas with board, components and their shadows."""
    board, shadow = bare_board().copy(), Image.new("L", (CANVAS, CANVAS), 0)
    tiles: list[tuple[Image.Image, tuple[int, int]]] = []
    for (part, kind, turn), offset, angle in zip(mountings, look.offsets, look.angles, strict=True):
        if kind is None:
            continue
        tile = part_picture(kind).rotate(turn + angle, Image.Resampling.BICUBIC, expand=True)
        corner = round(part.x + offset[0] - tile.width / 2), round(part.y + offset[1] - tile.height / 2)
        tiles.append((tile, corner))
        shadow.paste(150, (corner[0] + 5, corner[1] + 7), tile.getchannel("A"))
    board.paste((8, 14, 10), (0, 0), shadow.filter(ImageFilter.BoxBlur(4)))
    for tile, corner in tiles:
        board.paste(tile, corner, tile)
    return board


def _scratch(rng: np.random.Generator, board: Image.Image) -> Image.Image:
    """Draw a thin, slightly bent bright scratch with a dark edge."""
    length, heading, bend = rng.uniform(70, 170), rng.uniform(0, 2 * pi), rng.uniform(-0.5, 0.5)
    x, y = rng.uniform(110, 400, 2)
    points = []
    for step in np.linspace(-0.5, 0.5, 12):
        direction = heading + bend * step
        points.append((x + length * step * cos(direction), y + length * step * sin(direction)))
    width = int(rng.integers(4, 7))
    draw = ImageDraw.Draw(board)
    draw.line([(px + 2, py + 2) for px, py in points], fill=(20, 40, 28), width=width, joint="curve")
    draw.line(points, fill=tuple(int(c) for c in rng.uniform(175, 235) * np.array([1, 0.97, 0.88])), width=width - 1)
    return board


def _stain(rng: np.random.Generator, board: Image.Image) -> Image.Image:
    """Draw a half-transparent blob with an uneven rim, such as flux residue, corrosion or oil."""
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
    """The board shifted, turned and averaged down, before light and noise, float [SIZE, SIZE, 3]."""
    c, s, middle = cos(radians(look.turn)), sin(radians(look.turn)), CANVAS / 2
    dx, dy = middle + look.shift[0], middle + look.shift[1]
    inverse = (c, s, middle - c * dx - s * dy, -s, c, middle + s * dx - c * dy)
    posed = board.transform(board.size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR, fillcolor=BENCH)
    return np.asarray(posed.reduce(CANVAS // SIZE), dtype=np.float64)


def _mount(rng: np.random.Generator, defect: str) -> list[Mounting]:
    """The components of a board; one of them is missing or wrong if that is the defect."""
    mountings = list(CORRECT)
    if defect == "missing_component":
        index = int(rng.integers(len(LAYOUT)))
        mountings[index] = Mounting(LAYOUT[index], None)
    if defect == "wrong_component":
        index = int(rng.choice([index for index, part in enumerate(LAYOUT) if part.kind in MISTAKEN_FOR]))
        part = LAYOUT[index]
        if part.is_round or rng.random() < 0.5:  # nobody would see a round one turned
            mountings[index] = Mounting(part, str(rng.choice(MISTAKEN_FOR[part.kind])))
        else:
            mountings[index] = Mounting(part, part.kind, float(rng.choice([-1, 1]) * rng.uniform(25, 90)))
    return mountings


def make_board(rng: np.random.Generator, defect: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """One photo of the board.

    Args:
        rng: makes every random choice; pose, light and noise do not depend on ``defect``.
        defect: one of `DEFECTS`, or None for a good board.

    Returns:
        The image, uint8 [256, 256, 3], and its mask, bool [256, 256]: the pixels that the defect changed by more than
        `CHANGED` grey levels before light and noise; all False for a good board.

    Raises:
        ValueError: ``defect`` is not one of `DEFECTS`.
    """
    if defect is not None and defect not in DEFECTS:
        raise ValueError(f"no defect '{defect}': choose one of {', '.join(DEFECTS)}")
    look = Look.draw(rng)
    good = _photograph(_populate(CORRECT, look), look)
    photo = good
    while defect is not None and _changed(photo, good).sum() < VISIBLE:  # a dark stain on a dark chip may not show
        board = _populate(_mount(rng, defect), look)
        if defect == "scratch":
            board = _scratch(rng, board)
        if defect == "stain":
            board = _stain(rng, board)
        photo = _photograph(board, look)
    image = np.clip(photo * look.gain_HW3 + look.noise_HW3, 0, 255).round().astype(np.uint8)
    return image, _changed(photo, good)


def _changed(photo: np.ndarray, good: np.ndarray) -> np.ndarray:
    """The mask, bool [SIZE, SIZE]."""
    return np.abs(photo - good).max(axis=2) > CHANGED


def board_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """The random generator of one image. ``split`` is train, good (of the test set) or a defect."""
    return np.random.default_rng([seed, ("train", "good", *DEFECTS).index(split), index])


def make_demo_data(out: Path, seed: int = 0, train_good: int = 200, test_good: int = 20, per_defect: int = 10) -> Path:
    """Write the dataset in MVTec-AD's layout and return its folder, ``out``/circuit_board.

    The same arguments write the same bytes; existing files of the same names are replaced.

    Args:
        train_good, test_good, per_defect: number of good images to train on and to test on, and of images per defect.

    Raises:
        GladError: ``out`` cannot be written.
    """
    root = Path(out) / CATEGORY
    try:
        _write_split(root, seed, "train", "train/good", train_good)
        _write_split(root, seed, "good", "test/good", test_good)
        for defect in DEFECTS:
            _write_split(root, seed, defect, f"test/{defect}", per_defect)
    except OSError as error:
        raise GladError(f"{out}: {error.strerror or error}; choose a folder that can be written") from error
    return root


def _write_split(root: Path, seed: int, split: str, folder: str, count: int) -> None:
    defect = split if split in DEFECTS else None
    images, masks = root / folder, root / "ground_truth" / split
    images.mkdir(parents=True, exist_ok=True)
    if defect:
        masks.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image, mask = make_board(board_rng(seed, split, index), defect)
        Image.fromarray(image).save(images / f"{index:03d}.png")
        if defect:
            Image.fromarray(mask).save(masks / f"{index:03d}_mask.png")
