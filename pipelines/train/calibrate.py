"""`glad calibrate`: the denoising steps and the decision threshold of a bundle, from good images alone.

The threshold is set on scores of the scoring job itself, so the same archives and clusters are accepted here.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow.dataset as pads
import torch
from rich.console import Console
from rich.markup import escape

from cluster import session
from cluster.storage import Storage, StorageError, absolute, join
from glad_core.bundle.glad_json import Description, with_settings
from glad_core.bundle.good_scores import kept
from glad_core.bundle.model import load_bundle
from glad_core.bundle.settings import Profile, Settings
from glad_core.calibration import Calibrator, compared_framings, judged_images
from glad_core.decoding.picture import ImageError, decode
from glad_core.engine.process import set_up
from glad_core.errors import GladError
from glad_core.foreground import ForegroundMode
from glad_core.threshold import confident_threshold, conformal_quantile, far_more, images_needed
from glad_core.views import Frames
from pipelines.archive.fetch import fetch, neighbours
from pipelines.archive.sources import list_source
from pipelines.models.find import bundle_location, describe, local_bundle
from pipelines.models.variant import check_free, write_variant
from pipelines.runs.feedback import require_marks
from pipelines.runs.query import DECIDED
from pipelines.runs.run import Run
from pipelines.score.actor_plan import ActorWishes, plan_actors
from pipelines.score.job import score
from pipelines.score.request import ScoreRequest
from pipelines.train.side_by_side import count_judged, run_side_by_side

NAME = "calibrate"  # of the one job whose progress is shown
STEP_IMAGES = 40  # images that the denoising steps are chosen on


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


@dataclass(frozen=True)
class Scores:
    """Scores of a run's good images and of its confirmed anomalies, and the ids of the models that gave them.

    Scores are in pairs with their image's category.
    """

    good: list[tuple[float, str]]
    anomalous: list[tuple[float, str]]
    model_ids: set[str]

    def by_category(self, category: str) -> dict[str, list[float]]:
        """The good scores of each category that a bundle for ``category`` knows; under "" all, if that is one."""
        if "," not in category:
            return {"": [score for score, _ in self.good]}
        return {name: [score for score, kind in self.good if kind == name] for name in category.split(",")}


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
        scores = _read_scores(run, request.feedback)
        if scores.model_ids != {description.model_id}:
            judges = ", ".join(sorted(scores.model_ids))
            raise GladError(f"{request.run} was scored by {judges}, --model is {description.model_id}")
        if not request.anyway:
            allowed = description.provenance.get("target_fpr", request.target_fpr)
            for name, good in scores.by_category(description.category).items():
                _check_good(good, settings.threshold_for(name), allowed, name)
    calibrated = _calibrated(description, settings, scores, request)
    write_variant(base, calibrated, out, storage)
    _report(request, settings, Settings.parse(calibrated.settings, out), scores, console)
    return calibrated.model_id


def _calibrated(description: Description, settings: Settings, scores: Scores, request: CalibrateRequest) -> Description:
    """The bundle with these settings and the thresholds of the scores, one for each of several categories."""
    good = scores.by_category(description.category)
    thresholds = {name: _threshold(own, request.target_fpr, request.confidence, name) for name, own in good.items()}
    provenance: dict[str, Any] = {"target_fpr": request.target_fpr, "calibration_images": len(scores.good)}
    provenance["good_scores"] = {name: kept(own, len(good)) for name, own in good.items()}
    if request.confidence is not None:
        provenance["confidence"] = request.confidence
    whole = _threshold([score for score, _ in scores.good], request.target_fpr, request.confidence)
    chosen = {"threshold": whole, "thresholds": {} if "" in thresholds else thresholds}
    return with_settings(description, settings.model_copy(update=chosen), provenance)


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
    rows = [] if stays else _good_images(source, description.category, storage)
    session.connect(request.address, reads=[base, source], writes=[work])
    if rows:
        settings = _choose_steps(request, base, description, rows, storage, console)
    bundle, run = join(work, "bundle"), join(work, "run")
    write_variant(base, with_settings(description, settings, {}), bundle, storage, linked=True)
    score(ScoreRequest(source, run, model=bundle, seed=request.seed, address=request.address), console)
    return settings, _read_scores(Run.at(run, storage), with_feedback=False)


def _check(request: CalibrateRequest) -> None:
    if request.threshold_only and request.profile is not None:
        raise GladError("--threshold-only keeps the steps and the profile: leave out --profile or --threshold-only")
    if request.feedback and request.run is None:
        raise GladError("--feedback needs --run, the run whose alarms were marked in `glad view`")
    if request.run is not None and not request.threshold_only:
        raise GladError("a finished run fixes the denoising steps: add --threshold-only, or give the good images")


def _good_images(source: str, category: str, storage: Storage) -> list[dict[str, Any]]:
    """Rows of the images that can be judged: of a bundle for several categories, those of its own."""
    several = "," in category
    rows = [row for row in list_source(source, None, storage, several) if row.get("error_type") is None]
    if not rows:
        raise GladError(f"{source}: no images in it; name a folder, glob, list or tar of good images")
    rows = [row for row in rows if not several or row["category"] in category.split(",")]
    if not rows:
        raise GladError(f"{source}: no image of {category}, which the bundle is for: name its folders like them")
    return rows


def _choose_steps(
    request: CalibrateRequest,
    base: str,
    description: Description,
    rows: list[dict[str, Any]],
    storage: Storage,
    console: Console,
) -> Settings:
    """T, δ and min_step from up to `STEP_IMAGES` good images, evenly spread over the source.

    A task with an actor's resources chooses them: on a GPU if there is one, else with this machine's cores.
    """
    import ray

    few = [rows[index] for index in np.linspace(0, len(rows) - 1, min(len(rows), STEP_IMAGES)).round().astype(int)]
    storage = storage.patient()
    weights = sum(entry.size for entry in description.files.values())
    actors = plan_actors(session.resources(), ActorWishes(address=request.address), weights)
    gpu = actors.num_gpus > 0
    cpus = max(session.node_cpus()) if request.address is None and not gpu else actors.num_cpus
    profile = request.profile or Settings.parse(description.settings, base).profile
    console.print(
        f"choosing the denoising steps on {len(few)} of {len(rows)} images on {'a GPU' if gpu else f'{cpus:g} CPUs'}",
        highlight=False,
    )
    task: Any = ray.remote(num_cpus=cpus, num_gpus=actors.num_gpus)(steps_from)
    arguments = (few, base, description.model_id, storage, gpu, profile, request.foreground_mode, request.seed)
    job = {NAME: lambda events: ray.get(task.remote(*arguments, events))}
    outcome = run_side_by_side(job, 1, console)[NAME]
    if isinstance(outcome, BaseException):
        raise outcome
    chosen, skipped = outcome
    for message in skipped:
        console.print(f"[yellow]{escape(message)}; skipped[/yellow]", soft_wrap=True)
    return chosen


def steps_from(
    rows: list[dict[str, Any]],
    bundle: str,
    model_id: str,
    storage: Storage,
    gpu: bool,
    profile: Profile,
    foreground_mode: ForegroundMode,
    seed: int,
    events: Any,
) -> tuple[Settings, list[str]]:
    """The settings with T, δ and min_step chosen on listed good images, and one line for each unreadable one.

    ``events`` is the queue of what the user sees (`side_by_side`).

    Raises:
        GladError: none can be read, or another bundle than ``model_id`` is there.
    """
    set_up(gpu, torch.get_num_threads())  # as many as Ray gives the task, or OMP_NUM_THREADS
    model = load_bundle(local_bundle(bundle, storage), device="cuda" if gpu else "cpu", model_id=model_id)
    framings = compared_framings(model.settings, methods=False)
    good: list[Frames] = []
    names: list[str] = []
    categories: list[str] = []
    skipped: list[str] = []
    for row in rows:
        try:
            picture = decode(fetch(storage, row, partial(neighbours, row, rows)), framings)
            good.append(Frames(picture.frames, (picture.height, picture.width)))
            names.append(row["uri"])
            categories.append(row["category"] if model.prompts else model.category)
        except ImageError as error:
            skipped.append(f"{row['uri']}: {error}")
    if not good:
        raise GladError(f"none of the good images can be read; the first: {skipped[0]}")
    progress = count_judged(events, NAME, "choose steps", judged_images(good, model.settings, profile))
    calibrator = Calibrator(model, profile, foreground_mode, seed=seed, on_image=progress)
    return calibrator.choose(good, categories, names).settings, skipped


def _read_scores(run: Run, with_feedback: bool) -> Scores:
    """The scores of a finished run.

    With feedback, every image that nobody confirmed as anomalous is good, so all alarms must be marked: taking the
    marked ones alone would leave out the good images that score highest, or count defects as good.

    Raises:
        GladError: images have no finite score, or alarms are not marked.
    """
    _check_finite(run)
    table = run.results().to_table(columns=["score", "category", "model_id", "image_id", "is_anomalous"])
    model_ids, rows = set(table["model_id"].to_pylist()), table.to_pylist()
    if not with_feedback:
        return Scores([(row["score"], row["category"]) for row in rows], [], model_ids)
    verdicts = {mark["image_id"]: mark["verdict"] for mark in require_marks(run)}
    alarms = [row["image_id"] for row in rows if row["is_anomalous"]]
    unmarked = sum(image_id not in verdicts for image_id in alarms)
    if unmarked:
        raise GladError(
            f"{run.location}: {unmarked} of {len(alarms)} alarms are not marked yet; "
            f"mark them with `glad view {run.location}`"
        )
    parts: dict[bool, list[tuple[float, str]]] = {True: [], False: []}
    for row in rows:
        parts[verdicts.get(row["image_id"]) == "confirmed"].append((row["score"], row["category"]))
    return Scores(parts[False], parts[True], model_ids)


def _check_finite(run: Run) -> None:
    """Refuse a run in which images have no finite score: left out, they would make the threshold too low."""
    undecided = run.results().to_table(columns=["uri"], filter=~DECIDED)["uri"].to_pylist()
    undecided += (
        run.errors().to_table(columns=["uri"], filter=pads.field("error_type") == "not_finite")["uri"].to_pylist()
    )
    if undecided:
        raise GladError(
            f"{len(undecided)} images have no finite score, such as {undecided[0]}: "
            "leave them out, or train the bundle again"
        )


def _of(category: str) -> str:
    return f" of '{category}'" if category else ""


def _threshold(scores: list[float], target_fpr: float, confidence: float | None, category: str = "") -> float:
    """The score that a new good image exceeds with probability at most ``target_fpr``.

    Raises:
        GladError: too few scores.
    """
    needed, count = images_needed(target_fpr, confidence), len(scores)
    if count < needed:
        least = 1 / (count + 1) if confidence is None else 1 - (1 - confidence) ** (1 / max(count, 1))
        sure = "" if confidence is None else f" with confidence {confidence:g}"
        rate = f"{target_fpr:g}{sure}"
        raise GladError(
            f"{count} good images{_of(category)}: a false-positive rate of {rate} needs at least {needed}; "
            f"give more images or a --target-fpr of at least {least:.3g}"
        )
    if confidence is None:
        return conformal_quantile(scores, target_fpr)
    return confident_threshold(scores, target_fpr, confidence)


def _check_good(scores: list[float], threshold: float | None, target_fpr: float, category: str = "") -> None:
    """Refuse a run over images that cannot all be good ones like those behind the present ``threshold``.

    Raises:
        GladError: far more scores exceed it than its target false-positive rate allows.
    """
    if threshold is None:
        return
    exceeding = sum(score > threshold for score in scores)
    if far_more(exceeding, len(scores), target_fpr):
        raise GladError(
            f"{exceeding} of {len(scores)} images{_of(category)} exceed the present threshold {threshold:.4g}, which "
            f"allows {target_fpr:.1%} of good ones: are there defects among them, or has the camera changed? Look at "
            "them with `glad view`; --anyway calibrates on them all"
        )


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
