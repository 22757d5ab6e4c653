"""`glad score`: an archive of photos in, verdicts in Parquet out. Read `dataflow.py` next: it runs on the cluster."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape

from cluster import session
from cluster.storage import StorageError
from glad_core.errors import GladError
from pipelines.archive.decode import UNJUDGED, Reading
from pipelines.archive.earlier import BEING_WRITTEN, CHANGED
from pipelines.runs.claim import Plan, find_own
from pipelines.runs.commits import Written, commit_shards, complete, is_complete, is_whole
from pipelines.runs.run import Run
from pipelines.runs.schema import ERRORS
from pipelines.score.dataflow import run_dataflow
from pipelines.score.faults import news, start_faults
from pipelines.score.notify import Notifier, alarms_message, complete_message, notifying
from pipelines.score.open_run import Job, Opened, actor_settings, check, one_at_a_time, open_new, open_run
from pipelines.score.progress import Progress
from pipelines.score.record import methods, print_counts, print_end, run_record, without_reconstructions
from pipelines.score.request import Counts, NothingNew, ScoreRequest, TooManyErrors

__all__ = ["NothingNew", "TooManyErrors", "print_end", "score"]  # what the command uses

COMMITTERS = 8  # threads


def score(request: ScoreRequest, console: Console) -> Counts:
    """Run the job: check the request, open the run, score and commit what is missing, close the run.

    An interrupted run resumes after its last commit; a complete run is only reported.

    With ``new`` a run that was started before is completed first, and then judges what has come since.

    Raises:
        GladError, StorageError, SessionError: a mistake in the request or its surroundings, one line.
        TooManyErrors: more than ``max_errors``; what was written stays, without run.json.
        NothingNew: with ``new``: no new images, or another command on this machine is at work on them.
    """
    job = check(request)
    if not request.new:
        _name_model(job, console)
    with one_at_a_time(job.run) if request.new else nullcontext():
        found = find_own(job.run, job.identity, request.overwrite)
        whole = found.plan is not None and is_whole(job.run, found.plan)
        if whole and not request.new:
            console.print("this run is complete; --new scores images added since", highlight=False)
            return _report(job.run, console)
        if found.plan is None:
            job.run.storage.check_creates(job.run.location)
        patient = replace(job, run=job.run.patient())
        plan = (
            found.plan if whole else _score(patient, partial(open_run, patient, found, partial(_say, console)), console)
        )
        if request.new and found.plan is not None:
            assert plan is not None
            try:
                _score(patient, partial(open_new, patient, plan), console)
            except NothingNew as line:
                if whole:
                    raise
                _say(console, str(line))  # and that what was begun before is complete now
        return _report(job.run, console)


def _score(job: Job, open_it: Callable[[], Opened], console: Console) -> Plan:
    """Open the run, score and commit what is missing, close the run; returns its plan. Raises as `score`."""
    started = datetime.now(UTC)
    opened = open_it()
    before = opened.commits.copy()
    _announce(job, opened, console)
    clock = time.monotonic()
    with notifying(job.request.notify, partial(_say, console)) as notifier:
        try:
            _score_missing(job, opened, console, notifier)
        except (GladError, StorageError):
            if not _completed_by_another(job, opened.plan):
                raise
        seconds = time.monotonic() - clock
        if not is_complete(job.run, opened.plan):
            _close(job, opened, started, seconds, _totals(before.values())["done"])
            if notifier is not None:
                ours = [commit for shard, commit in opened.commits.items() if shard not in before]
                notifier.send(partial(complete_message, job.run, opened.plan, ours), last=True)
    return opened.plan


def _completed_by_another(job: Job, plan: Plan) -> bool:
    """Whether another job of this command has finished the run, and deleted what this one had staged."""
    impatient = Run(job.run.location, replace(job.run.storage, attempts=1))  # storage may be what failed
    try:
        return is_complete(impatient, plan)
    except StorageError:
        return False


def _report(run: Run, console: Console) -> Counts:
    counts = Counts(**run.record["counts"])
    print_counts(run, counts, console)
    return counts


def _name_model(job: Job, console: Console) -> None:
    request = job.request
    _say(console, job.models.line(request.model))
    if request.reconstructions and (without := without_reconstructions(methods(job.models))):
        _say(console, without)


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _announce(job: Job, opened: Opened, console: Console) -> None:
    request, plan, actors, commits = job.request, opened.plan, opened.actors, opened.commits
    if job.request.new:  # a command that finds nothing new prints one line
        _name_model(job, console)
    images = f"{plan.images} images in {escape(job.source)}"
    if plan.added:
        latest = plan.added[-1].images
        images = f"{latest} new images in {escape(job.source)}, {plan.images} in the run"
    console.print(f"{images}; {actors.describe()}", highlight=False)
    if request.address is not None and request.num_gpus is None and not actors.num_gpus:
        console.print("this cluster has no GPU, so its CPUs compute: --num-gpus 1 waits for GPUs", highlight=False)
    for reason in (CHANGED, BEING_WRITTEN):
        if reason in plan.left_out:
            console.print(f"{plan.left_out[reason]} {reason}", highlight=False)
    earlier = plan.images - plan.added[-1].images if plan.added else 0
    resumed = _totals(commits.values())["done"] - earlier
    if resumed > 0:
        console.print(f"resuming after {resumed} images", highlight=False)
    _log(opened).info("%d of %d shards of %s are missing", plan.shards - len(commits), plan.shards, job.run.location)


def _score_missing(job: Job, opened: Opened, console: Console, notifier: Notifier | None) -> None:
    """Score the shards without a commit; adds theirs to ``opened.commits`` as they come.

    Raises:
        TooManyErrors: as `score`.
    """
    request, run, plan, actors, commits = job.request, job.run, opened.plan, opened.actors, opened.commits
    log, totals = _log(opened), _totals(commits.values())
    latest = plan.shards - plan.listings[-1].shards  # of a run that grows, what came last may fail so often
    earlier_errors = sum(commit.errors for shard, commit in commits.items() if shard < latest)
    reading = Reading(job.source, request.decode_seconds, request.pages)
    waiting_for = partial(session.waiting_for, actors.num_cpus, actors.num_gpus)
    faults = start_faults()
    settings = actor_settings(job, opened, faults)
    with (
        Progress(console, plan.images, totals["done"], waiting_for, partial(news, faults)) as progress,
        closing(run_dataflow(run, plan, set(commits), reading, settings, actors)) as pieces,
        ThreadPoolExecutor(COMMITTERS) as pool,
    ):
        for piece, commit in commit_shards(run, plan, pieces, pool):
            totals = {name: count + getattr(piece, name) for name, count in totals.items()}
            progress.update(totals["done"], totals["anomalies"], totals["errors"])
            if commit is not None:
                commits[commit.shard] = commit
                progress.kept += commit.done
                if notifier is not None and commit.anomalies:
                    notifier.send(partial(alarms_message, run, plan, commit))
                log.info("shard %d committed: %d scored, %d errors", commit.shard, commit.scored, commit.errors)
            errors = totals["errors"] - earlier_errors
            if request.max_errors is not None and errors > request.max_errors:
                raise TooManyErrors(
                    f"stopped after {errors} errors, more than --max-errors {request.max_errors}; "
                    f"see {run.path(ERRORS)}"
                )


def _close(job: Job, opened: Opened, started: datetime, seconds: float, before: int) -> None:
    """Delete what no commit names and write run.json. ``before``: images that were done when this job began.

    Raises:
        GladError: shards are missing; another command has begun anew in the folder.
    """
    run, plan, commits = job.run, opened.plan, opened.commits
    missing = plan.shards - len(commits)
    if missing:
        raise GladError(f"{run.location}: {missing} of {plan.shards} shards are missing; run the command again")
    totals = _totals(commits.values())
    anomalies = totals["anomalies"] if _has_threshold(job, opened) else None
    counts = Counts(
        images=plan.images,
        scored=totals["scored"],
        anomalies=anomalies,
        errors=totals["errors"],
        duplicates=plan.duplicates,
        blank=plan.blank,
        doubtful=totals["doubtful"],
        left_out=plan.left_out | ({UNJUDGED: totals["unjudged"]} if totals["unjudged"] else {}),
        pages=totals["pages"],
    )
    record = run_record(job.request, job.identity, run, job.models, opened.actors, counts, started, seconds)
    record |= {"judged": totals["done"] - before}
    complete(run, plan, commits, record)
    _log(opened).info("complete: %d scored, %d errors", counts.scored, counts.errors)


def _has_threshold(job: Job, opened: Opened) -> bool:
    """Whether any image was called anomalous or good."""
    memory = opened.memory(job.run)
    if memory is None:
        return any(settings.threshold is not None for settings in job.models.settings().values())
    from pipelines.score.patch_memory import read_memory

    return read_memory(memory, job.run.storage).threshold is not None


def _totals(commits: Iterable[Written]) -> dict[str, int]:
    commits = list(commits)
    return {
        name: sum(getattr(commit, name) for commit in commits)
        for name in ("scored", "anomalies", "errors", "doubtful", "pages", "unjudged", "done")
    }


def _log(opened: Opened) -> Any:
    return logging.LoggerAdapter(logging.getLogger("glad.score"), {"run": opened.plan.run})
