"""How a model sees a picture of any size and shape: as one square, or cut into tiles; and one map from many tiles.

A *view* makes a *frame* of the picture, whose sides are at least R, and cuts it into *tiles* of R x R (of the features'
side where good patches are compared, `Settings.framings`). The networks only see tiles. Their maps are blended into one
map of the frame, which covers the picture and nothing else.

    squash   the whole picture as one tile; its aspect ratio is not kept (the paper's)
    fit      the whole picture as one tile, aspect ratio kept, the rest filled with its mirror image
    tiles    the picture at a fixed scale, in tiles that overlap

Shapes: H W the picture, h w its part of the frame, R side of a tile, g side of a tile's map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

Place = tuple[int, int]  # top and left of a tile in its frame, pixels
GRID = 16  # tiles lie on multiples of R / 16, where the tokens of usual networks begin


@dataclass(frozen=True)
class Framing:
    """What decides a view's frames. Light, so that processes that only decode images need no more.

    Attributes:
        kind: of the view.
        side: R, pixels.
        scale: frame pixels per picture pixel; for ``tiles`` alone.
        overlap: share of a tile's side that the next tile covers again, at least; for ``tiles`` alone.
        white: the stored value that is white in pictures of more than 8 bits; None for the whole range of their type, 0
            for each picture's own largest value.
    """

    kind: Literal["squash", "fit", "tiles"]
    side: int
    scale: float = 1.0
    overlap: float = 0.25
    white: float | None = None

    def covered(self, height: int, width: int) -> tuple[int, int]:
        """h and w: what a picture of this size covers of its frame, pixels."""
        if self.kind == "squash":
            return self.side, self.side
        scale = self.scale if self.kind == "tiles" else self.side / max(height, width)
        unit = max(1, self.side // GRID)

        def scaled(length: int) -> int:
            pixels = max(1, round(length * scale))
            # Rounded, so that the last tile lies on the grid too.
            return pixels if pixels <= self.side else self.side + -(-(pixels - self.side) // unit) * unit

        return scaled(height), scaled(width)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a picture's frame, pixels."""
        h, w = self.covered(height, width)
        return max(h, self.side), max(w, self.side)

    def frame(self, image_HW3: np.ndarray) -> np.ndarray:
        """The frame of a picture, uint8 [H, W, 3] to uint8: bilinear, antialiased when shrinking (Pillow's filter)."""
        return self.frame_of(image_HW3, (image_HW3.shape[0], image_HW3.shape[1]))

    def frame_of(self, image_HW3: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """The frame of a picture of another ``size`` than the image that shows it."""
        h, w = self.covered(*size)
        if image_HW3.shape[:2] != (h, w):
            image_HW3 = np.asarray(Image.fromarray(image_HW3).resize((w, h), Image.Resampling.BILINEAR))
        missing = (max(0, self.side - h), max(0, self.side - w))
        if not any(missing):
            return image_HW3
        return np.pad(image_HW3, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")

    def places(self, height: int, width: int) -> list[Place]:
        """Where the tiles of a picture of this size lie, row by row. The first and the last touch the frame's edges."""
        rows, columns = map(self._along, self.size(height, width))
        return list(product(rows, columns))

    def _along(self, length: int) -> list[int]:
        gaps = -(-(length - self.side) // max(1, round(self.side * (1 - self.overlap))))
        unit = max(1, self.side // GRID)
        return [round(number * (length - self.side) / max(1, gaps) / unit) * unit for number in range(gaps + 1)]


class Frames(NamedTuple):
    """A picture as the views see it: a frame of each, uint8 [h, w, 3], and its own height and width."""

    frames: list[np.ndarray]
    size: tuple[int, int]


def random_tile(frames: Sequence[np.ndarray], side: int, seed: int) -> np.ndarray:
    """A tile of a random view at a random place of its frame, which need not be one where tiles are judged."""
    rng = np.random.default_rng(seed)
    frame = frames[int(rng.integers(len(frames)))]
    top, left = (int(rng.integers(length - side + 1)) for length in frame.shape[:2])
    return frame[top : top + side, left : left + side]


def cut(frame_hw3: np.ndarray, places: Sequence[Place], side: int) -> list[np.ndarray]:
    """The tiles of a frame, [R, R, 3] each; they share its memory."""
    return [frame_hw3[top : top + side, left : left + side] for top, left in places]


def blend(maps: Sequence[np.ndarray], places: Sequence[Place], covered: tuple[int, int], side: int) -> np.ndarray:
    """The map of a picture from those of its tiles, float32 [h·g/R, w·g/R].

    Where tiles overlap, each counts the more the farther its edge is, so that no seam can be seen.

    Args:
        maps: of the tiles, [g, g] each.
        covered: h and w, pixels.
        side: R, pixels.
    """
    g = len(maps[0])
    rows, columns = (max(1, round(length * g / side)) for length in covered)
    if len(maps) == 1:
        return maps[0][:rows, :columns].astype(np.float32)
    ramp = np.minimum(np.arange(1, g + 1), np.arange(g, 0, -1)).astype(np.float32)
    weight = ramp[:, None] * ramp
    corners = [(round(top * g / side), round(left * g / side)) for top, left in places]
    size = [max(corner[axis] for corner in corners) + g for axis in (0, 1)]
    total, weights = np.zeros(size, np.float32), np.zeros(size, np.float32)
    for (top, left), tile in zip(corners, maps, strict=True):
        total[top : top + g, left : left + g] += weight * tile
        weights[top : top + g, left : left + g] += weight
    return (total / weights)[:rows, :columns]


def join(tiles: Sequence[np.ndarray], places: Sequence[Place], covered: tuple[int, int]) -> np.ndarray:
    """A picture's frame from its tiles, uint8 [h, w, 3]: of two tiles that overlap, each keeps its half."""
    side = len(tiles[0])
    size = [max(place[axis] for place in places) + side for axis in (0, 1)]
    whole = np.empty((*size, 3), np.uint8)
    edges = [_halves(sorted({place[axis] for place in places}), side) for axis in (0, 1)]
    for (top, left), tile in zip(places, tiles, strict=True):
        rows, columns = edges[0][top], edges[1][left]
        whole[rows, columns] = tile[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return whole[: covered[0], : covered[1]]


def _halves(starts: list[int], side: int) -> dict[int, slice]:
    """What each of the tiles in a row keeps, by its start."""
    middles = [(following + start + side) // 2 for start, following in pairwise(starts)]
    bounds = [0, *middles, starts[-1] + side]
    return {start: slice(begin, end) for start, begin, end in zip(starts, bounds, bounds[1:], strict=False)}
