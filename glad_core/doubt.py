"""What a picture has that a bundle was not made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glad_core.bundle.settings import Settings

LONG, LARGE = 1.5, 4.0  # times longer than wide, and larger than the model sees: what goes beyond is said


def doubt_about(settings: Settings, row: Mapping[str, Any]) -> str | None:
    """What a decoded picture has that the model was not made for, in words; None if there is nothing to say.

    Args:
        row: ``height`` and ``width`` upright, and the ``peak`` of a picture of more than 8 bits (`decoding.picture`).
    """
    size, usual = (row["height"], row["width"]), settings.picture_size
    longer, large = max(size) / min(size), max(size) / max(framing.side for framing in settings.framings())
    kinds, doubts = {view.kind for view in settings.views}, []
    as_long = usual is not None and longer <= LONG * max(usual) / min(usual)
    if kinds == {"squash"} and longer > LONG and not as_long:
        doubts.append(f"{longer:.1f} times longer than wide, seen as a square")
    as_large = usual is not None and max(size) <= 2 * max(usual)
    if "tiles" not in kinds and large > LARGE and not as_large:
        doubts.append(f"{large:.0f} times larger than the model sees")
    peak = row.get("peak")
    if peak is not None and settings.white_level is None and peak < (1 if peak <= 1 else 65535) / 4:
        doubts.append("less than a quarter of its bits' range, and the model has no white level")
    if peak is not None and settings.white_level is not None and peak > settings.white_level:
        doubts.append("brighter than the white level")
    if peak is not None and settings.dark_level is not None and peak < settings.dark_level:
        doubts.append("far darker than the training pictures")
    return "; ".join(doubts) or None
