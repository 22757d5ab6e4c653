"""How soon a job that was interrupted at 90 % resumes, compared with the time that listing its archive took.

    python benchmarks/resume.py [--json] [--images 200000]

The archive is a local tree of hard links, the model a null one. The first driver ends when nine tenths are committed.

listing_seconds        of listing the archive into the manifest, in the first run
resume_seconds         from the start of the second `glad score` until Ray Data gets the missing shards: checks, bundle,
                       plan, commits; Ray runs already, as on a cluster
resume_over_listing    the second divided by the first
first_images_seconds   from the start of the second `glad score` to its first new commit, start of Ray Data included
listed_again           whether the second run listed the archive
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from pipeline import QUIET, NullActor, long_folder

from cluster import session
from pipelines.runs.schema import COMPLETE
from pipelines.score import dataflow, job, open_run
from pipelines.score.request import ScoreRequest


class CutOff(BaseException):
    """The end of the first driver; nothing in the product catches it."""


class Moments(job.Progress):
    """Records the first progress of the job; interrupts the first run at ``cut`` images."""

    cut: int | None = None
    first: float | None = None

    def update(self, done: int, anomalies: int, errors: int) -> None:
        if Moments.first is None:
            Moments.first = time.perf_counter()
        if Moments.cut is not None and done >= Moments.cut:
            raise CutOff


def main(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
    images: Annotated[int, typer.Option(help="images in the archive")] = 200_000,
    share: Annotated[float, typer.Option(help="share that is finished when the first driver ends")] = 0.9,
) -> None:
    """Measure and print."""
    figures: dict[str, Any] = {"images": images}
    moments: dict[str, float] = {}
    listings = 0
    list_remotely, run_dataflow = open_run.list_remotely, job.run_dataflow

    def timed_listing(*args: Any) -> Any:
        nonlocal listings
        started = time.perf_counter()
        found = list_remotely(*args)
        moments["listing"], listings = time.perf_counter() - started, listings + 1
        return found

    def timed_dataflow(*args: Any) -> Any:
        moments["dataflow"] = time.perf_counter()
        return run_dataflow(*args)

    dataflow.GladActor, job.Progress = NullActor, Moments  # type: ignore[misc, assignment]
    open_run.list_remotely, job.run_dataflow = timed_listing, timed_dataflow
    with tempfile.TemporaryDirectory() as name:
        archive, out = long_folder(Path(name), images), Path(name) / "out"
        request = ScoreRequest(str(archive), str(out), "small")
        session.connect()
        Moments.cut = round(share * images)
        try:
            job.score(request, QUIET)
            raise AssertionError("the first run was not cut off")
        except CutOff:
            figures["listing_seconds"] = moments["listing"]
            figures["committed_shards"] = len(list((out / "commits").iterdir()))
        Moments.cut = Moments.first = None
        started = time.perf_counter()
        counts = job.score(request, QUIET)
        assert Moments.first is not None
        figures["resume_seconds"] = moments["dataflow"] - started
        figures["first_images_seconds"] = Moments.first - started
        figures["listed_again"] = listings > 1
        figures["resume_over_listing"] = figures["resume_seconds"] / figures["listing_seconds"]
        run = json.loads((out / COMPLETE).read_text())
        assert counts.scored == images == run["counts"]["scored"]
    print(json.dumps(figures) if as_json else "\n".join(f"{name:24} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    typer.run(main)
