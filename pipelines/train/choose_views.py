"""Which views a new bundle gets, from the sizes and shapes of its training pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glad_core.bundle.settings import View
from glad_core.views import Framing

LONG = 1.5  # times longer than wide: what one square does to such a picture is no longer small
LARGE = 2.0  # times the bundle's resolution: beyond, a square loses half of all detail
MOST_TILES = 48  # of a usual picture: each costs as much as a whole picture in one square
SCALES = [1 / share for share in np.arange(1, 200, 0.25)]
Size = tuple[int, int]  # height and width, pixels


def usual_size(sizes: Sequence[Size]) -> Size:
    """The median height and width."""
    height, width = np.median(np.array(sizes), axis=0).round().astype(int)
    return int(height), int(width)


def choose_views(sizes: Sequence[Size], resolution: int) -> tuple[tuple[View, ...], str]:
    """The views for pictures of these sizes, and why, in words.

    The whole picture is always one: as a square, or with its aspect ratio kept if pictures are long and of different
    shapes. Tiles are added if the usual picture is more than twice as large as the square, at its own scale, or at the
    largest that cuts it into no more than `MOST_TILES`.
    """
    ratios = [max(size) / min(size) for size in sizes]
    shapes = {round(width / height, 1) for height, width in sizes}
    long = float(np.mean([ratio > LONG for ratio in ratios]))
    whole = "fit" if long > 0.05 and len(shapes) > 1 else "squash"
    height, width = usual_size(sizes)
    words = f"the usual picture has {width} x {height} pixels, the model {resolution} x {resolution}"
    if max(height, width) <= LARGE * resolution:
        return (View(kind=whole),), f"{words}: one view of the whole"
    scale = next((s for s in SCALES if _tiles(s, resolution, height, width) <= MOST_TILES), SCALES[-1])
    tiles = View(kind="tiles", scale=round(scale, 4))
    count = _tiles(tiles.scale, resolution, height, width)
    return (View(kind=whole), tiles), f"{words}: the whole, and {count} tiles at {tiles.scale:.0%} of its scale"


def _tiles(scale: float, resolution: int, height: int, width: int) -> int:
    return len(Framing("tiles", resolution, scale).places(height, width))
