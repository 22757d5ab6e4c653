"""`glad calibrate`: the denoising steps and the decision threshold of a bundle, from good images alone.

The threshold is set on scores of the scoring job itself, so the same archives and clusters are accepted here.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console

from cluster import session
from cluster.storage import Storage, StorageError, absolute, join
from glad_core.bundle.glad_json import Description, with_settings
from glad_core.bundle.settings import Profile, Settings
from glad_core.errors import GladError
from glad_core.foreground import ForegroundMode
from pipelines.models.find import bundle_location, describe
from pipelines.models.variant import check_free, write_variant
from pipelines.runs.run import Run
from pipelines.score.job import score
from pipelines.score.request import ScoreRequest
from pipelines.train.choose_steps import choose_steps, good_images
from pipelines.train.thresholds import Scores, check_good, read_scores, with_thresholds


@dataclass(frozen=True)
class CalibrateRequest:
    """The options of `glad calibrate`; ``source`` holds good images only, ``run`` a finished run over good images."""

    source: str | None
    run: str | None
    model: str
    out: str
    target_fpr: float
    threshold_only: bool
    foreground_mode: ForegroundMode
    profile: Profile | None = None  # None keeps the bundle's
    confidence: float | None = None  # None: the target holds on average over sets of good images
    anyway: bool = False  # even if far more good images exceed the present threshold than it allows
    feedback: bool = False  # ``run`` is any run whose alarms people have marked
    seed: int = 0
    address: str | None = None


def calibrate(request: CalibrateRequest, console: Console) -> str:
    """Write the calibrated bundle and return its model id.

    Raises:
        GladError, StorageError, SessionError: nothing to calibrate on, ``out`` exists, too few images for the target.
    """
    _check(request)
    storage = Storage.from_environment()
    base, out = bundle_location(request.model), absolute(request.out)
    check_free(out, storage)
    description = describe(base, storage)
    settings = Settings.parse(description.settings, base)
    if request.run is None:
        with _workplace(out, storage) as work:
            settings, scores = _judge(request, base, description, settings, work, storage, console)
    else:
        run = Run.at(request.run, storage)
        # Older versions recorded no --good, but the method that needs it.
        if run.record.get("request", {}).get("good", run.record.get("method") == "nearest"):
            raise GladError(f"{request.run} was judged by images of --good, not by a bundle: score without --good")
        scores = read_scores(run, request.feedback)
        if scores.model_ids != {description.model_id}:
            judges = ", ".join(sorted(scores.model_ids))
            raise GladError(f"{request.run} was scored by {judges}, --model is {description.model_id}")
        if not request.anyway:
            allowed = description.provenance.get("target_fpr", request.target_fpr)
            for name, good in scores.by_category(description.category).items():
                check_good(good, settings.threshold_for(name), allowed, name)
    calibrated = with_thresholds(description, settings, scores, request.target_fpr, request.confidence)
    write_variant(base, calibrated, out, storage)
    _report(request, settings, Settings.parse(calibrated.settings, out), scores, console)
    return calibrated.model_id


@contextmanager
def _workplace(out: str, storage: Storage) -> Iterator[str]:
    """The folder OUT.calibrate for the bundle and the run of the meantime, which the whole cluster can read.

    It is deleted at the end, and what a killed command left of it at the beginning.

    Raises:
        GladError: it holds something else, or another command has begun anew in it. StorageError: not writable.
    """
    work, token = f"{out}.calibrate", uuid.uuid4().hex.encode()
    claim = join(work, "claim")

    def clear() -> None:
        for name in ("run", "bundle"):
            storage.delete_folder(join(work, name))
        storage.delete_file(claim)  # last: without it nothing says that the folder is ours
        storage.delete_folder(work)

    if storage.kind(claim) == "file":
        clear()
    elif storage.kind(work) == "folder" and next(storage.walk(work), None) is not None:
        raise GladError(f"{work} is in the way: choose another --out, or move that folder")
    try:
        begun = storage.create(claim, token)
    except StorageError as error:
        raise StorageError(f"cannot write {work}: choose another --out ({error})") from error
    try:
        if begun:
            yield work
    finally:
        alone = storage.read_all([claim])[0] == token
        if alone:
            clear()
    if not alone:
        raise GladError(f"another `glad calibrate` writes to {work}, so this one stops")


def _judge(
    request: CalibrateRequest,
    base: str,
    description: Description,
    settings: Settings,
    work: str,
    storage: Storage,
    console: Console,
) -> tuple[Settings, Scores]:
    """The settings with their denoising steps chosen, unless they are to stay, and the scores that they give."""
    assert request.source is not None
    source = absolute(request.source)
    # The nearest good patches have no steps; a profile asked for is one of those that have.
    stays = request.threshold_only or (settings.method == "nearest" and request.profile is None)
    rows = [] if stays else good_images(source, description.category, storage)
    session.connect(request.address, reads=[base, source], writes=[work])
    if rows:
        settings = choose_steps(
            rows,
            base,
            description,
            storage,
            console,
            profile=request.profile,
            foreground_mode=request.foreground_mode,
            seed=request.seed,
            address=request.address,
        )
    bundle, run = join(work, "bundle"), join(work, "run")
    write_variant(base, with_settings(description, settings, {}), bundle, storage, linked=True)
    score(ScoreRequest(source, run, model=bundle, seed=request.seed, address=request.address), console)
    return settings, read_scores(Run.at(run, storage), with_feedback=False)


def _check(request: CalibrateRequest) -> None:
    if request.threshold_only and request.profile is not None:
        raise GladError("--threshold-only keeps the steps and the profile: leave out --profile or --threshold-only")
    if request.feedback and request.run is None:
        raise GladError("--feedback needs --run, the run whose alarms were marked in `glad view`")
    if request.run is not None and not request.threshold_only:
        raise GladError("a finished run fixes the denoising steps: add --threshold-only, or give the good images")


def _thresholds(settings: Settings) -> str:
    if settings.thresholds:
        return "thresholds " + ", ".join(f"{name} {value:.4g}" for name, value in settings.thresholds.items())
    return "no threshold" if settings.threshold is None else f"threshold {settings.threshold:.4g}"


def _report(
    request: CalibrateRequest, settings: Settings, calibrated: Settings, scores: Scores, console: Console
) -> None:
    if request.feedback:
        missed = sum(score <= (calibrated.threshold_for(name) or 0) for score, name in scores.anomalous)
        misses = f"{missed} of {len(scores.anomalous)} confirmed anomalies do not exceed the new one"
        console.print(f"{_thresholds(settings)} before; {misses}", markup=False, highlight=False, soft_wrap=True)
    steps = f"start step {settings.start_step}"
    if settings.method == "nearest":
        steps = "nearest good patches"
    elif settings.profile == "exact":
        steps += f", stop when the difference exceeds {settings.delta:.4g}, or below step {settings.min_step}"
    promise = f"a new good image exceeds it with probability at most {request.target_fpr:g}"
    if request.confidence is not None:
        promise = f"at most {request.target_fpr:g} of new good images exceed it, confidence {request.confidence:g}"
    console.print(
        f"{steps}; {_thresholds(calibrated)} from {len(scores.good)} good images: {promise}",
        highlight=False,
        soft_wrap=True,
    )
