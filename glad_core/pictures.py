"""Scores of whole pictures, tiles and views included, and pictures with synthetic anomalies: what calibration needs.

Shapes: N pictures, V views, R side of what the bundle's method sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from glad_core.bundle.model import Model
from glad_core.bundle.settings import Settings
from glad_core.drawn_anomalies import draw_anomalies
from glad_core.engine.base import Queue, run
from glad_core.engine.engine import Engine
from glad_core.engine.nearest import NearestEngine
from glad_core.foreground import ForegroundMode, foreground
from glad_core.images import to_tensor
from glad_core.stitch import tile_requests, view_scores
from glad_core.verdict import Detection, NotFinite, Request
from glad_core.views import Frames, Framing

TILES = 256  # judged before the next pictures are cut: their verdicts are held together


def as_pictures(images: Sequence[np.ndarray | Frames]) -> list[Frames]:
    """Pictures; an array [R, R, 3] is one that fills its only frame."""
    return [
        image if isinstance(image, Frames) else Frames([image], (image.shape[0], image.shape[1])) for image in images
    ]


def all_framings(*settings: Settings) -> tuple[Framing, ...]:
    """The different framings of several settings' views, for pictures that all of them are to judge."""
    return tuple(dict.fromkeys(framing for each in settings for framing in each.framings()))


def seen_by(settings: Settings, framings: Sequence[Framing], pictures: Sequence[Frames]) -> list[Frames]:
    """Pictures with a frame for each of ``framings``; of their frames, those of the settings' views."""
    own = [framings.index(framing) for framing in settings.framings()]
    return [Frames([picture.frames[index] for index in own], picture.size) for picture in pictures]


def tiles_of(pictures: Sequence[Frames], settings: Settings) -> list[list[np.ndarray]]:
    """The tiles of every picture in all views."""
    return [[tile.image for view in _requests(picture, settings) for tile in view] for picture in pictures]


def _requests(picture: Frames, settings: Settings, category: str | None = None) -> list[list[Request]]:
    return tile_requests("", picture.frames, settings, picture.size, category)


def score_pictures(
    model: Model,
    pictures: Sequence[Frames],
    categories: Sequence[str],
    names: Sequence[str],
    batch_size: int,
    seed: int,
    on_image: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Scores of pictures in every view, float64 [N, V], not standardised. Every view's frame is judged.

    Raises:
        NotFinite: as `judge_all`.
    """
    scores: list[list[float]] = []
    for chosen in _groups(pictures, model.settings):
        cut = [_requests(pictures[index], model.settings) for index in chosen]
        by_view = []
        for view in range(len(model.settings.views)):
            owners = [index for index, views in zip(chosen, cut, strict=True) for _ in views[view]]
            tiles = [tile.image for views in cut for tile in views[view]]
            kinds, whose = [categories[index] for index in owners], [names[index] for index in owners]
            by_view.append(iter(judge_all(model, tiles, kinds, whose, batch_size, seed, on_image, view)))
        for index, views in zip(chosen, cut, strict=True):
            judged = [[next(verdicts) for _ in tiles] for verdicts, tiles in zip(by_view, views, strict=True)]
            scores.append(view_scores(model.settings, pictures[index].size, judged))
    return np.array(scores)


def _groups(pictures: Sequence[Frames], settings: Settings) -> Iterator[list[int]]:
    """Indices of consecutive pictures that have about `TILES` tiles together."""
    group: list[int] = []
    count = 0
    for index, picture in enumerate(pictures):
        group.append(index)
        count += sum(len(framing.places(*picture.size)) for framing in settings.framings())
        if count >= TILES:
            yield group
            group, count = [], 0
    if group:
        yield group


def with_anomalies(
    good: Sequence[np.ndarray], foreground_mode: ForegroundMode, seed: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Every good image [R, R, 3] with an anomaly, and the masks, bool [N, R, R]."""
    foreground_BRR = foreground(to_tensor(good), foreground_mode).numpy() if foreground_mode != 3 else None
    seeds = [seed * 1_000_003 + index for index in range(len(good))]
    return draw_anomalies(good, seeds=seeds, foreground_BRR=foreground_BRR)


def anomalous_pictures(
    pictures: Sequence[Frames], framings: Sequence[Framing], side: int, foreground_mode: ForegroundMode, seed: int
) -> tuple[list[Frames], list[Frames]]:
    """Good pictures, and the same with one synthetic anomaly each, for a comparison of the two.

    An anomaly is put into a square of the largest frame; both pictures' other frames are made from that frame, so that
    nothing but the anomaly tells them apart.

    Args:
        pictures: with a frame for each of ``framings``.
        side: of the square, pixels: at most that of a tile.
    """
    largest = [max(range(len(framings)), key=lambda index: picture.frames[index].size) for picture in pictures]
    squares = [
        _square(picture.frames[index].shape, framings[index].covered(*picture.size), side, (seed, number))
        for number, (picture, index) in enumerate(zip(pictures, largest, strict=True))
    ]
    parts = [picture.frames[index][square] for picture, index, square in zip(pictures, largest, squares, strict=True)]
    changed, _ = with_anomalies(parts, foreground_mode, seed)
    good, anomalous = [], []
    for picture, index, square, part in zip(pictures, largest, squares, changed, strict=True):
        frame = picture.frames[index].copy()
        frame[square] = part
        good.append(_reframed(picture.frames[index], index, picture, framings))
        anomalous.append(_reframed(frame, index, picture, framings))
    return good, anomalous


def _square(frame: tuple[int, ...], covered: tuple[int, int], side: int, seed: tuple[int, int]) -> tuple[slice, slice]:
    """A random square of a frame, in what the picture covers of it where that is large enough."""
    rng = np.random.default_rng(seed)
    lengths = [max(part, min(side, whole)) for part, whole in zip(covered, frame[:2], strict=True)]
    top, left = (int(rng.integers(length - side + 1)) for length in lengths)
    return slice(top, top + side), slice(left, left + side)


def _reframed(frame: np.ndarray, view: int, picture: Frames, framings: Sequence[Framing]) -> Frames:
    """The picture as one of its frames shows it, in all views."""
    h, w = framings[view].covered(*picture.size)
    frames = [
        frame if other == view else framing.frame_of(frame[:h, :w], picture.size)
        for other, framing in enumerate(framings)
    ]
    return Frames(frames, picture.size)


def engine_of(model: Model, view: int, slots: int, seed: int) -> Queue:
    """What judges one view's tiles by the bundle's method."""
    if model.settings.method == "nearest":
        return NearestEngine(model, model.memory[view], slots)
    return Engine(model, slots, seed)


def judge_all(
    model: Model,
    images: Sequence[np.ndarray],
    categories: Sequence[str],
    names: Sequence[str],
    batch_size: int,
    seed: int,
    on_image: Callable[[int], None] = lambda count: None,
    view: int = 0,
) -> list[Detection]:
    """The verdicts on images [R, R, 3] of one view, in their order; the first failure is raised.

    Equal images of a category are judged once: those with an anomaly differ from the good ones in few of their tiles.

    Raises:
        NotFinite: images have no finite score; the message names the model, their number and one of them.
    """
    equal: dict[tuple[str, bytes], list[int]] = {}
    for index, image in enumerate(images):
        equal.setdefault((categories[index], image.tobytes()), []).append(index)
    detections: dict[int, Detection] = {}
    undecided: dict[int, NotFinite] = {}
    copies = {str(indices[0]): indices for indices in equal.values()}
    requests = [Request(image_id, images[one], categories[one]) for image_id, (one, *_) in copies.items()]
    for request, verdict in run(engine_of(model, view, batch_size, seed), requests):
        indices = copies[request.image_id]
        if isinstance(verdict, NotFinite):
            undecided |= dict.fromkeys(indices, verdict)
        elif isinstance(verdict, Exception):
            raise verdict
        else:
            detections |= dict.fromkeys(indices, verdict)
        on_image(len(indices))
    if undecided:
        first = min(undecided)
        raise NotFinite(
            f"model {model.model_id} has no verdict on {len(undecided)} of {len(images)} good images and copies with "
            f"synthetic anomalies, such as {names[first]}: {undecided[first]}; train it again, or leave them out"
        )
    return [detections[index] for index in range(len(images))]
