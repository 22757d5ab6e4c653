"""`glad score PICTURE` without --out: the verdict on one picture, in this process. No Ray, no run folder."""

from __future__ import annotations

from dataclasses import fields
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

from rich.console import Console

from cluster.storage import Storage, absolute
from glad_core.decoding.picture import ImageError, is_image
from glad_core.errors import GladError
from pipelines.archive.fetch import fetch
from pipelines.archive.sources import WILDCARDS
from pipelines.archive.uris import printable
from pipelines.models.find import find_models, pretrained
from pipelines.score.request import ScoreRequest

if TYPE_CHECKING:
    from glad_core.detector import Verdict

HEEDED = ("source", "out", "model", "category", "seed")  # options that mean something for a single picture
STOPPED_BY = {
    "difference": "there the picture differed from its reconstruction",
    "min_step": "the last one allowed: no step differed",
    "none": "none: the bundle does not search for one",
}


def is_picture(source: str, storage: Storage) -> bool:
    """Whether SOURCE names one picture, there or not, and no folder, glob, list or tar.

    Raises:
        StorageError: an unknown kind of location, or storage cannot be used.
    """
    if not is_image(source):
        return False
    kind = storage.kind(absolute(source))
    return kind == "file" or (kind == "none" and not WILDCARDS.search(source))


def print_verdict(request: ScoreRequest, console: Console) -> None:
    """Judge the picture that the request's ``source`` is, with the numbers that a run gives it, and print the verdict.

    Raises:
        GladError, StorageError: no such picture or bundle, a damaged one, an option that would have no effect.
    """
    for option in fields(request):
        if option.name not in HEEDED and getattr(request, option.name) != option.default:
            name = {"compiled": "compile"}.get(option.name, option.name).replace("_", "-")
            raise GladError(f"--{name} needs --out: without it, the verdict on one picture is only printed")
    storage, name = Storage.from_environment(), printable(request.source)
    try:
        data = fetch(storage, {"uri": absolute(request.source)})
    except ImageError as error:
        raise GladError(f"{name}: {error}") from error
    models = find_models(request.model, storage)
    detector = pretrained(request.model, request.category, seed=request.seed)
    with NamedTemporaryFile() as copy:  # the picture may be on S3
        copy.write(data)
        copy.flush()
        try:
            verdict = detector(copy.name, request.category)
        except GladError as error:
            raise GladError(f"{name}: {str(error).removeprefix(f'{copy.name}: ')}") from error
    console.print(
        "\n".join(_lines(name, models.line(request.model), verdict)), highlight=False, markup=False, soft_wrap=True
    )


def _lines(name: str, model: str, verdict: Verdict) -> list[str]:
    word = {True: "anomalous", False: "good", None: "no verdict: the bundle has no threshold"}[verdict.is_anomalous]
    steps = "" if verdict.stop_step is None else f"{verdict.stop_step}, "
    lines = [
        model,
        f"{name}: {word}",
        f"score      {verdict.score:.4g}",
        f"threshold  {'none' if verdict.threshold is None else format(verdict.threshold, '.4g')}",
        *([] if verdict.p_value is None else [f"p-value    {verdict.p_value:.2g}"]),
        f"stop step  {steps}{STOPPED_BY[verdict.stop_reason]}",
    ]
    return [*lines, f"doubt      {verdict.doubt}"] if verdict.doubt else lines
