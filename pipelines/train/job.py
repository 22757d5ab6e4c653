"""`glad train`: train one part of a bundle on good images with Ray Train, calibrate it, write a new bundle.

`run_training` is the job, top to bottom: survey the images, train, calibrate, deliver. It runs in a thread of the
command, which `glad retrain` has many of side by side, and leaves all work to Ray's tasks and workers. It resumes from
its last checkpoint, whatever was killed: a worker, a node, or the command, which the user then gives again.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from cluster import session
from cluster.quick_imports import quick_imports
from cluster.storage import Storage, absolute, join
from glad_core.bundle.glad_json import GLAD_JSON, read_description
from glad_core.bundle.settings import Settings, View
from glad_core.errors import GladError
from pipelines.models.find import describe
from pipelines.models.variant import check_free
from pipelines.train.choose_views import choose_views
from pipelines.train.good_images import GoodImage, apply_feedback, good_images
from pipelines.train.kept_frames import TASK_MEMORY, Kept, keep
from pipelines.train.plan import TrainRequest, claim_work, plan_job, with_resources
from pipelines.train.side_by_side import run_side_by_side, send_event
from pipelines.train.spec import FATAL, IDENTITY, Deliver, Outcome, TrainJob, clear_work
from pipelines.train.survey import Survey, survey


def train(request: TrainRequest, console: Console) -> str:
    """Run the whole job and return the new bundle's model id.

    The folder ``OUT.train`` beside the new bundle holds checkpoints and metrics while the job runs; the metrics stay.

    Raises:
        GladError, StorageError, SessionError: a mistake in the request, one line, before any work.
    """
    storage = Storage.from_environment()
    out = absolute(request.out)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    images = good_images(request.dataset, request.category, storage, out.rpartition("/")[2], say)
    images, changes = apply_feedback(images, request.exclude, request.include, storage)
    if changes:
        say(changes)
    job = plan_job(request, list(images), storage, name=" ".join(images), work=f"{out}.train")
    check_free(out, storage)
    claim_work(storage, job.work)
    session.connect(request.address, reads=[absolute(request.dataset), job.base], writes=[job.work])
    job = with_resources(job, request)
    count, recipe = sum(map(len, images.values())), job.recipe
    steps = f"{recipe.steps} steps of {recipe.batch_size} on {job.device}"
    say(f"{count} good pictures: {steps}, then calibration; how long they take is said after the first seconds")
    deliver = partial(deliver_bundle, storage=storage, out=out)
    outcome = run_side_by_side({job.name: partial(run_training, job, images, deliver)}, 1, console)[job.name]
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome.model_id


def describe_end(location: str) -> list[str]:
    """What ends the command: the bundle's threshold, how well it separates, what was held out, and what to do next."""
    from glad_core.threshold import images_needed  # scipy takes a second, and only the end needs it

    description = describe(location, Storage.from_environment())
    settings, facts = Settings.parse(description.settings, location), cast(dict[str, Any], description.provenance)
    held_out, fitted, target = (facts.get(name, 0) for name in ("held_out_images", "good_images", "target_fpr"))
    lines = [f"bundle {description.model_id} in {location}, for {description.category}"]
    judged = facts.get("calibration_images", held_out)  # pictures behind the threshold
    if settings.threshold is not None:
        share = max(target, 1 / (judged + 1))  # of so many scores the largest is exceeded that often
        more = ", or more, since many have twins (see above)" if "threshold_doubt" in facts else ""
        lines.append(f"threshold {settings.threshold:.4g}, which about {share:.1%} of good pictures will exceed{more}")
    if settings.thresholds:
        lines.append("thresholds: " + ", ".join(f"{name} {value:.4g}" for name, value in settings.thresholds.items()))
    behind = min(map(len, facts.get("good_scores", {}).values()), default=judged)  # the threshold of fewest pictures
    held = f"held out: {held_out} of {held_out + fitted} good pictures, not trained on"
    if "calibration_images" in facts:
        held += f"; the threshold is that of {judged}, each judged by patches of others than itself and its neighbours"
    if target and behind < (needed := images_needed(target)):  # no training holds out what a small target needs
        each = " of each category" if settings.thresholds else ""
        held += f"; for {target:.1%} it takes {needed}{each}: `glad calibrate` with as many others sets the threshold"
    lines.append(held)
    if "methods" in facts:
        quality = facts["methods"][facts["method"]]  # not always the best: another has to be clearly better
        lines.append(
            f"quality on those held out: AUROC {quality:.3f} (1 is perfect, 0.5 is chance) against synthetic defects, "
            "which are often smaller and fainter than real ones"
        )
    return [*lines, f"next: glad score PICTURES --model {shlex.quote(location)} --out RESULTS"]


def deliver_bundle(bundle: Path, job: TrainJob, surveyed: Survey, *, storage: Storage, out: str) -> Outcome:
    """Copy the bundle to ``out`` and its metrics beside it, and delete the checkpoints."""
    if not storage.publish(bundle, out, GLAD_JSON):
        raise GladError(f"{out} already exists: choose another --out or remove it")
    clear_work(storage, job.work, out)
    return Outcome("trained", read_description(bundle).model_id)


Prepare = Callable[[TrainJob, Survey], TrainJob | Outcome]


def run_training(
    job: TrainJob,
    images: dict[str, list[GoodImage]],
    deliver: Deliver,
    events: Any,
    prepare: Prepare | None = None,
) -> Outcome:
    """One training job from images to a delivered bundle.

    Args:
        images: good images by category.
        deliver: brings the finished bundle where it belongs.
        events: queue of what the user sees (`side_by_side`).
        prepare: called after the survey; returns the job with its folder, or the outcome of an earlier, identical run.
    """
    import ray

    job = replace(job, storage=job.storage.patient())
    surveyed = _survey(job, images, events)
    job = _with_views(replace(job, images=surveyed.fit, white_level=surveyed.white_level), surveyed, events)
    if prepare is not None:
        prepared = prepare(job, surveyed)
        if isinstance(prepared, Outcome):
            return prepared
        job = prepared
    _check_identity(job, surveyed)
    kept, surveyed = _kept(job, surveyed), replace(surveyed, kept=None)  # of no use after the training
    checkpoint = _fit(replace(job, kept=kept), events)
    del kept
    finishing = ray.remote(num_cpus=job.cpus, num_gpus=job.gpus, memory=TASK_MEMORY)(_finish)
    return ray.get(finishing.remote(job, surveyed, checkpoint, deliver, events))


def _survey(job: TrainJob, images: dict[str, list[GoodImage]], events: Any) -> Survey:
    send = partial(send_event, events, job.name, "survey")
    send()
    description = describe(job.base, job.storage)
    surveyed = survey(images, description.settings["resolution"], job.storage, job.kept_bytes)
    for uri, reason in surveyed.skipped:
        send(warning=f"{uri}: {reason}; skipped")
    if surveyed.paged:
        files = f"{len(surveyed.paged)} files with further pages, such as {surveyed.paged[0]}"
        send(warning=f"{files}: training takes the first page of each")
    if surveyed.white_level is not None:
        brightest = f"pictures of more than 8 bits, the brightest value {max(surveyed.peaks):g}"
        send(warning=f"{brightest}: {surveyed.white_level:g} is taken for white")
    if len(surveyed.sizes) > 1:
        send(warning=f"images of {len(surveyed.sizes)} sizes ({', '.join(surveyed.sizes[:3])}, …)")
    return surveyed


def _with_views(job: TrainJob, surveyed: Survey, events: Any) -> TrainJob:
    """The job with the views of its bundle: those asked for; a UNet's are chosen, a preset's and other parts' kept."""
    if job.views is not None:
        return job
    description = describe(job.base, job.storage)
    settings = Settings.parse(description.settings, job.base).judged_by("glad")
    if job.part != "unet" or description.provenance.get("preset") or settings.views != (View(),):
        return replace(job, views=settings.views)
    views, reason = choose_views(surveyed.shapes, settings.resolution)
    if [view.kind for view in views] != ["squash"]:
        send_event(events, job.name, "survey", warning=f"{reason}; --views decides otherwise")
    return replace(job, views=views)


def _kept(job: TrainJob, surveyed: Survey) -> Kept:
    """Pictures as the training sees them: the survey's own, if it saw them the same way."""
    framings = job.framings(describe(job.base, job.storage).settings["resolution"])
    seen = surveyed.kept
    if seen is not None and not surveyed.peaks and framings == tuple(replace(f, white=None) for f in seen.framings):
        return replace(seen, framings=framings)
    return keep(surveyed.fit, surveyed.shapes[: len(surveyed.fit)], framings, job.storage, job.kept_bytes)


def _check_identity(job: TrainJob, surveyed: Survey) -> None:
    """Refuse the folder of a different run; delete the mark of an earlier failure, since this is a new attempt."""
    identity = job.identity(surveyed)
    file = join(job.work, IDENTITY)
    if job.storage.kind(file) == "file":
        earlier = json.loads(job.storage.read(file))
        changed = [key for key in identity if earlier.get(key) != identity[key]]
        if changed:
            raise GladError(
                f"{job.work} holds another run (different {', '.join(changed)}): remove it or choose another --out"
            )
    job.storage.write(file, json.dumps(identity, indent=1).encode())
    job.storage.delete_file(join(job.work, FATAL))


def _fit(job: TrainJob, events: Any) -> Any:
    """Train with ``job.workers``, resuming if there is a checkpoint; returns the last checkpoint."""
    from pipelines.train.group import run_group

    send_event(events, job.name, "wait for room")  # until a worker says that it prepares
    try:
        checkpoint = run_group(_work, {"job": job, "events": events}, job)
    except Exception as error:
        reason = _fatal(job) or " ".join(str(error).split())[:300]
        raise GladError(f"{job.name}: training failed: {reason}") from error
    fatal = _fatal(job)
    if fatal is not None:
        raise GladError(f"{job.name}: {fatal}")
    if checkpoint is None:
        raise GladError(f"{job.name}: training left no checkpoint in {job.work}; give the same command again")
    return checkpoint


# These two are in this light module since the command's own process has them as well: it would import for seconds what
# only a worker needs.


def _work(config: dict[str, Any]) -> None:
    with quick_imports("transformers", "peft", "scipy"):
        from pipelines.train.worker import train_worker
    train_worker(config)


def _finish(*arguments: Any) -> Outcome:
    with quick_imports("transformers", "peft"):
        from pipelines.train.finish import finish
    return finish(*arguments)


def _fatal(job: TrainJob) -> str | None:
    """Why trying again is pointless, None if it is not."""
    file = join(job.work, FATAL)
    return job.storage.read(file).decode() if job.storage.kind(file) == "file" else None
