"""One verdict per picture, from the verdicts on the tiles of all its views.

A view's score is the published rule (Sec. 3.6) on its blended map. With several views, each is standardised by the good
pictures of calibration, and the largest counts: a picture is as anomalous as its most anomalous view. Its map is the
mean of the views' maps, in which a view has the more weight the more anomalous the picture is in it.

Shapes: H W the picture, h w its map at token resolution (or at full size, `scoring.full_size_only`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

from glad_core import scoring
from glad_core.bundle.settings import Settings, View
from glad_core.verdict import Detection, Request, Tile
from glad_core.views import Framing, Place, blend, cut, join

Value = TypeVar("Value", float, np.ndarray)

# A view that is one standard deviation of good pictures more anomalous than another has e² times the weight in the map.
SHARPNESS = 2.0


def tile_requests(
    image_id: str, frames: Sequence[np.ndarray], settings: Settings, size: tuple[int, int], category: str | None = None
) -> list[list[Request]]:
    """The tiles of a picture as requests, by view.

    Args:
        frames: of every view, as `Framing.frame` makes them.
        size: H and W.
    """
    return [
        [Request(image_id, tile, category) for tile in cut(frame, framing.places(*size), framing.side)]
        for framing, frame in zip(settings.framings(), frames, strict=True)
    ]


def stitch(
    settings: Settings, size: tuple[int, int], by_view: Sequence[Sequence[Detection]], keep_reconstruction: bool = True
) -> Detection:
    """The verdict on a picture from those on its tiles, in the order of `tile_requests`.

    ``anomaly_map`` is the weighted mean of the views' maps, at the size of that with the most pixels; the weights are
    the softmax of the standardised scores times `SHARPNESS`. ``steps`` and ``reconstruction`` are those of the deciding
    view, ``stop_step`` of its worst tile. A picture of one tile that covers it keeps the tile's verdict as it is.

    Args:
        size: H and W of the picture.
        keep_reconstruction: else ``reconstruction`` is that of the worst tile.
    """
    views, framings = settings.views, settings.framings()
    first = by_view[0][0]
    if len(by_view) == len(by_view[0]) == 1 and framings[0].covered(*size) == (framings[0].side,) * 2:
        return first
    maps = [_map_of(framing, size, found) for framing, found in zip(framings, by_view, strict=True)]
    full_sizes = [_full_size(settings, anomaly_map, found) for anomaly_map, found in zip(maps, by_view, strict=True)]
    scores = [
        scoring.score_of_map(anomaly_map, settings, full_size)
        for anomaly_map, full_size in zip(maps, full_sizes, strict=True)
    ]
    if len(views) > 1:
        scores = [_standardised(score, view) for score, view in zip(scores, views, strict=True)]
        maps = [_standardised(anomaly_map, view) for anomaly_map, view in zip(maps, views, strict=True)]
    decides = int(np.argmax(scores))
    finest = max(range(len(maps)), key=lambda index: maps[index].size)
    worst = max(by_view[decides], key=lambda tile: tile.score)
    framing = framings[decides]
    rebuilt = worst.reconstruction
    if keep_reconstruction:
        places = framing.places(*size)
        rebuilt = join([tile.reconstruction for tile in by_view[decides]], places, framing.covered(*size))
    return Detection(
        image_id=first.image_id,
        score=scores[decides],
        stop_step=worst.stop_step,
        stop_reason=worst.stop_reason,
        steps=worst.steps,
        anomaly_map=_weighted_mean(maps, scores, maps[finest].shape).astype(np.float16),
        reconstruction=rebuilt,
        seconds=sum(tile.seconds for tiles in by_view for tile in tiles),
        full_size=full_sizes[finest],
        tiles=list(_tiles(settings, framings, size, by_view)),
    )


def view_scores(settings: Settings, size: tuple[int, int], by_view: Sequence[Sequence[Detection]]) -> list[float]:
    """The score of every view, not standardised; what calibration standardises by."""
    scores = []
    for view, found in zip(settings.views, by_view, strict=True):
        alone = settings.model_copy(update={"views": (view,)})
        scores.append(stitch(alone, size, [found], keep_reconstruction=False).score)
    return scores


def standards(scores_NV: np.ndarray) -> list[tuple[float, float]]:
    """Mean and spread (standard deviation) of good pictures' scores in every view, from [N, V] of them.

    A single view needs none: 0 and 1. Nor can one picture have a spread: 1.
    """
    if scores_NV.shape[1] == 1:
        return [(0.0, 1.0)]
    means, spreads = scores_NV.mean(axis=0), scores_NV.std(axis=0)
    return [(float(mean), float(spread) or 1.0) for mean, spread in zip(means, spreads, strict=True)]


def combined_score(settings: Settings, scores: Sequence[float]) -> float:
    """The score of a picture from those of its views, as `view_scores` gives them."""
    if len(scores) == 1:
        return scores[0]
    return max(_standardised(score, view) for score, view in zip(scores, settings.views, strict=True))


def _standardised(value: Value, view: View) -> Value:
    return (value - view.good_mean) / view.good_spread


def _map_of(framing: Framing, size: tuple[int, int], found: Sequence[Detection]) -> np.ndarray:
    maps = [tile.anomaly_map for tile in found]
    return blend(maps, framing.places(*size), framing.covered(*size), framing.side)


def _full_size(settings: Settings, anomaly_map: np.ndarray, found: Sequence[Detection]) -> tuple[int, int]:
    """Height and width of the view's map at full size: D pixels for a tile's side."""
    share = settings.feature_resolution / len(found[0].anomaly_map)
    height, width = (max(1, round(length * share)) for length in anomaly_map.shape)
    return height, width


def _weighted_mean(maps: Sequence[np.ndarray], scores: Sequence[float], shape: tuple[int, int]) -> np.ndarray:
    """The mean of standardised maps, at one size, weighted by their scores."""
    resized = [
        torch.from_numpy(anomaly_map)
        if anomaly_map.shape == shape
        else scoring.resize_map(torch.from_numpy(anomaly_map)[None], shape)[0]
        for anomaly_map in maps
    ]
    weights = (torch.tensor(scores) * SHARPNESS).softmax(dim=0)
    return (torch.stack(resized) * weights[:, None, None]).sum(dim=0).numpy()


def _tiles(
    settings: Settings, framings: Sequence[Framing], size: tuple[int, int], by_view: Sequence[Sequence[Detection]]
) -> Iterator[Tile]:
    for view, framing, found in zip(settings.views, framings, by_view, strict=True):
        for place, tile in zip(framing.places(*size), found, strict=True):
            box = _in_picture(place, framing, size)
            yield Tile(view.kind, *box, tile.score, tile.stop_step, tile.stop_reason)


def _in_picture(place: Place, framing: Framing, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, left, height and width of a tile, in pixels of the picture, without what lies outside of it."""
    starts, lengths = [], []
    for start, covered, length in zip(place, framing.covered(*size), size, strict=True):
        begin = round(start * length / covered)
        starts.append(begin)
        lengths.append(max(1, min(length, round((start + framing.side) * length / covered)) - begin))
    return starts[0], starts[1], lengths[0], lengths[1]
