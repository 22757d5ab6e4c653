"""Anomalies of another kind than those of training, to compare methods and settings by.

What was trained on synthetic anomalies (`glad_core.synthesis`) finds these better than real defects, so that it looks
better beside the nearest good patches than it is. Here are spots, scratches, smears and parts in the wrong place, with
soft edges; sizes and contrasts are our own choice, looked at on drawn boards.

Shapes: B images, R side of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

LEAST, MOST = 20, 90  # change of grey values by a spot or scratch, of 255


def draw_anomalies(
    images: Sequence[np.ndarray], *, seeds: Sequence[int], foreground_BRR: np.ndarray | None = None
) -> tuple[list[np.ndarray], np.ndarray]:
    """Every image, uint8 [R, R, 3], with one anomaly, and the masks, bool [B, R, R].

    An anomaly depends on its seed and image alone.

    Args:
        foreground_BRR: bool; the middle of an anomaly lies on it, if it has any.

    Raises:
        ValueError: not one seed per image.
    """
    drawn, masks = [], []
    for row, (image, seed) in enumerate(zip(images, seeds, strict=True)):
        allowed = None if foreground_BRR is None else foreground_BRR[row]
        changed, mask = _draw(image, np.random.default_rng(seed), allowed)
        drawn.append(changed)
        masks.append(mask)
    return drawn, np.stack(masks)


def _draw(image: np.ndarray, rng: np.random.Generator, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    side = len(image)
    middle = _middle(side, rng, allowed)
    kind = rng.choice(["spot", "scratch", "smear", "misplaced"])
    if kind == "scratch":
        shape = _scratch(side, middle, rng)
    else:
        least, most = {"spot": (0.02, 0.1), "smear": (0.05, 0.2), "misplaced": (0.05, 0.15)}[kind]
        shape = _ellipse(side, middle, rng.uniform(least, most, 2) * side)
    opacity = np.asarray(shape.filter(ImageFilter.GaussianBlur(side / 128)), np.float32)[..., None] / 255
    if kind == "smear":
        blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(side * rng.uniform(0.02, 0.06)))
        other = np.asarray(blurred).astype(np.float64)
    elif kind == "misplaced":
        apart = rng.integers(side // 4, side - side // 4 + 1, 2)
        other = np.roll(image[:, ::-1], tuple(apart), axis=(0, 1)).astype(np.float64)
    else:
        # In a grey picture it is grey.
        tint = rng.uniform(0.7, 1.0, 3 if np.ptp(image, axis=2).any() else 1)
        change = rng.uniform(LEAST, MOST) * tint
        # Dark places tend to get bright spots, or nothing would be seen.
        brighter = rng.uniform(0, 255) > image[_covered(shape)].mean()
        other = image + (change if brighter else -change)
    mixed = image + opacity * (other.clip(0, 255) - image)
    return mixed.round().astype(np.uint8), _covered(shape)


def _covered(shape: Image.Image) -> np.ndarray:
    """Where a drawn shape is, bool [R, R]."""
    return np.asarray(shape) > 127


def _middle(side: int, rng: np.random.Generator, allowed: np.ndarray | None) -> np.ndarray:
    """x and y of the middle of an anomaly."""
    if allowed is None or not allowed.any():
        return rng.uniform(0.1, 0.9, 2) * side
    places = np.argwhere(allowed)
    return places[rng.integers(len(places))][::-1].astype(float)


def _ellipse(side: int, middle: np.ndarray, radii: np.ndarray) -> Image.Image:
    shape = Image.new("L", (side, side))
    radii = radii.clip(1)
    ImageDraw.Draw(shape).ellipse([*(middle - radii), *(middle + radii)], fill=255)
    return shape


def _scratch(side: int, middle: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A line with two bends, mostly straight."""
    shape = Image.new("L", (side, side))
    directions = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.3, 3))
    steps = np.stack([np.cos(directions), np.sin(directions)], axis=1) * rng.uniform(0.05, 0.2) * side
    points = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
    points += middle - points.mean(axis=0)
    width = max(1, round(rng.uniform(1, 3) * side / 128))
    ImageDraw.Draw(shape).line([tuple(point) for point in points], fill=255, width=width, joint="curve")
    return shape
