"""The door for Python: a bundle as an object that judges pictures as `glad score` does. See docs/python.md.

detector = glad_core.Detector.from_pretrained("board")
verdict = detector("photo.png")
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glad_core.bundle.glad_json import GLAD_JSON, SMALL, SMALL_BUNDLE, SMALL_IS
from glad_core.bundle.model import Model, load_bundle
from glad_core.doubt import doubt_about
from glad_core.engine.base import Queue, run
from glad_core.errors import GladError
from glad_core.judge import map_at_full_size
from glad_core.picture_of import PictureOf, picture_of
from glad_core.pictures import engine_of
from glad_core.scoring import resize_map
from glad_core.stitch import stitch, tile_requests
from glad_core.verdict import Detection, Request

IN_FLIGHT = 8  # images, or tiles, per call of the networks


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a `Detector` says about one picture of H x W pixels.

    Attributes:
        name: the path that was given, or the picture's number in the call.
        score: the larger, the more anomalous; in the unit of the bundle's threshold.
        threshold: of the bundle, for the category; None if it was never calibrated.
        is_anomalous: whether the score exceeds it; None without one.
        p_value: conformal: a good picture has one of at most α with probability at most α
            (`glad_core.bundle.good_scores`); None if the bundle does not have the good scores behind its threshold.
        map: how anomalous each pixel is, float32 [H, W].
        image: the picture as it was judged, upright, uint8 [H, W, 3].
        reconstruction: the picture without its defects, uint8 [h, w, 3] as the model made it; None of a bundle that
            compares with good patches.
        stop_step: the denoising step that it was rebuilt from; None if there was none.
        stop_reason: why there.
        doubt: what the picture has that the bundle was not made for; None if there is nothing to say.
    """

    name: str
    score: float
    threshold: float | None
    is_anomalous: bool | None
    p_value: float | None
    map: np.ndarray
    image: np.ndarray
    reconstruction: np.ndarray | None
    stop_step: int | None
    stop_reason: str
    category: str
    model_id: str
    doubt: str | None

    def __repr__(self) -> str:
        word = {True: "anomalous", False: "good", None: "no threshold"}[self.is_anomalous]
        limit = "" if self.threshold is None else f", threshold {self.threshold:.4g}"
        return f"<Verdict {self.name}: {word}, score {self.score:.4g}{limit}{'; ' + self.doubt if self.doubt else ''}>"

    def show(self, path: str | os.PathLike[str] | None = None) -> None:
        """Show picture, reconstruction and heat map side by side, in a notebook or a window; or write them to ``path``.

        The file's format follows from its suffix, as Matplotlib reads it.
        """
        from matplotlib import pyplot

        pictures = [("picture", self.image), ("without defects", self.reconstruction), ("heat map", self.image)]
        shown = [(title, picture) for title, picture in pictures if picture is not None]
        height, width = self.map.shape
        figure, axes = pyplot.subplots(1, len(shown), figsize=(4 * len(shown), 0.6 + 4 * height / width), squeeze=False)
        for axis, (title, picture) in zip(axes[0], shown, strict=True):
            axis.imshow(picture, extent=(0, width, height, 0))
            axis.set_title(title)
            axis.set_axis_off()
        axes[0][-1].imshow(self.map, cmap="turbo", alpha=0.5, extent=(0, width, height, 0))
        figure.suptitle(repr(self)[9:-1])
        if path is None:
            pyplot.show()
        else:
            figure.savefig(path)
        pyplot.close(figure)


class Detector:
    """A bundle that judges pictures in this process, with the numbers that `glad score` gives the same files."""

    def __init__(self, model: Model, name: str = "", seed: int = 0) -> None:
        self.model, self.name, self.seed = model, name, seed
        views = range(len(model.settings.views))
        if model.settings.method == "nearest":
            self._engines: list[Queue] = [engine_of(model, view, IN_FLIGHT, seed) for view in views]
        else:
            self._engines = [engine_of(model, 0, IN_FLIGHT, seed)] * len(views)

    @classmethod
    def from_pretrained(cls, bundle: str | os.PathLike[str], device: str | None = None, seed: int = 0) -> Detector:
        """Load a bundle that `glad train` made.

        Args:
            bundle: its folder; or ``small``, the demo's, which was trained on drawn circuit boards. For ``s3://`` and
                model registries see `pipelines.pretrained`.
            device: ``cpu``, ``cuda`` or ``mps``; default: cuda if there is a GPU, else cpu.
            seed: of the random noise; `glad score` has 0, too.

        Raises:
            GladError: no bundle there, or a damaged one; no such device.
        """
        name = os.fspath(bundle)
        if "://" in name:
            raise GladError(f"{name}: glad_core reads folders of this machine; use pipelines.pretrained({name!r})")
        embedded = name == SMALL and not Path(SMALL, GLAD_JSON).is_file()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device.startswith("cuda"):
            torch.backends.cudnn.allow_tf32 = False  # a score must not depend on the other pictures of a call
        try:
            model = load_bundle(SMALL_BUNDLE if embedded else name, device)
        except (RuntimeError, AssertionError) as error:
            raise GladError(f"device '{device}' cannot be used on this machine; try cpu ({error})") from error
        return cls(model, f"{name}: {SMALL_IS}" if embedded else name, seed)

    def __repr__(self) -> str:
        return f"<Detector {self.name} ({self.model.model_id}) for {self.model.category or 'no named category'}>"

    def __call__(self, pictures: Any, category: str | None = None) -> Any:
        """Judge a picture, or a list of pictures together.

        Args:
            pictures: the path of a file, a PIL image, or an array [H, W], [H, W, 3] or [H, W, 4] of uint8, of uint16 or
                of fractions 0..1, in RGB; or an iterable of these. Of a file with several pages the first is taken.
            category: of the pictures, if the bundle is for several.

        Returns:
            A `Verdict`; of an iterable, a list of them in the same order.

        Raises:
            GladError: what was given is no picture, or a damaged one; the first of a list is named. No such category.
            NotFinite: there is no verdict on a picture, as its score is not a finite number.
        """
        known = sorted(self.model.prompts)
        if known and category not in known:
            raise GladError(f"this bundle is for several categories: give category=, one of {', '.join(known)}")
        if not _several(pictures):
            return self._judge([(0, pictures)], category)[0]
        numbered = enumerate(pictures)
        return [
            verdict
            for first in numbered
            for verdict in self._judge([first, *islice(numbered, IN_FLIGHT - 1)], category)
        ]

    def _judge(self, given: list[tuple[int, Any]], category: str | None) -> list[Verdict]:
        """The verdicts on pictures, whose images share the calls of the networks."""
        settings = self.model.settings
        names = [os.fspath(one) if isinstance(one, str | os.PathLike) else f"picture {index}" for index, one in given]
        pictures = [picture_of(one, settings.white_level, name) for (_, one), name in zip(given, names, strict=True)]
        requests = [self._requests(name, picture, category) for name, picture in zip(names, pictures, strict=True)]
        judged: dict[Request, Detection] = {}
        for view, engine in enumerate(self._engines):
            for request, verdict in run(engine, [tile for views in requests for tile in views[view]]):
                if isinstance(verdict, Exception):
                    raise verdict
                judged[request] = verdict
        with torch.inference_mode():
            return [
                self._verdict(name, picture, [[judged[tile] for tile in tiles] for tiles in views], category)
                for name, picture, views in zip(names, pictures, requests, strict=True)
            ]

    def _requests(self, name: str, picture: PictureOf, category: str | None) -> list[list[Request]]:
        frames = [framing.frame(picture.image) for framing in self.model.settings.framings()]
        return tile_requests(name, frames, self.model.settings, picture.image.shape[:2], category)

    def _verdict(self, name: str, picture: PictureOf, by_view: list[list[Detection]], category: str | None) -> Verdict:
        settings, size = self.model.settings, picture.image.shape[:2]
        detection = stitch(settings, size, by_view)
        threshold = settings.threshold_for(category)
        row = {"height": size[0], "width": size[1], "peak": picture.peak}
        doubts = [doubt for doubt in (picture.doubt, doubt_about(settings, row)) if doubt]
        anomaly_map = map_at_full_size(settings, detection)
        return Verdict(
            name=name,
            score=detection.score,
            threshold=threshold,
            # As results are stored and compared, in single precision.
            is_anomalous=None if threshold is None else bool(np.float32(detection.score) > np.float32(threshold)),
            p_value=self.model.p_value(detection.score, category),
            map=resize_map(anomaly_map[None].cpu(), size)[0].numpy(),
            image=picture.image,
            reconstruction=detection.reconstruction if settings.method == "glad" else None,
            stop_step=detection.stop_step,
            stop_reason=detection.stop_reason,
            category=category or self.model.category,
            model_id=self.model.model_id,
            doubt="; ".join(doubts) or None,
        )


def _several(pictures: Any) -> bool:
    """Whether more than one picture is meant; an array and a PIL image are one, whatever they can be iterated for."""
    kind = type(pictures)  # asked for its array, a PIL image would be decoded
    is_array = hasattr(kind, "__array_interface__") or hasattr(kind, "__array__")
    return isinstance(pictures, Iterable) and not is_array and not isinstance(pictures, str | bytes)
