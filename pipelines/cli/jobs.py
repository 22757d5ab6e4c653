"""Commands about jobs on a cluster: submit, and `glad jobs ...`. `pipelines.cli.main` adds them to `glad`."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from cluster import jobs
from glad_core.errors import GladError
from pipelines.cli.models import STOPPED

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

Server = Annotated[
    str | None,
    typer.Option(
        help="Dashboard of the cluster, http://host:8265; RAY_API_SERVER_ADDRESS or this machine's by default"
    ),
]
Job = Annotated[str, typer.Argument(help="Id of the job, raysubmit_...")]
PLACES = ("source", "dataset", "out", "model", "base", "good", "run", "textures", "results", "plain")


def submit(
    command: Annotated[list[str], typer.Argument(help="After --: the command, without `glad`")],
    address: Server = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow what the job prints to its end")] = True,
) -> None:
    """Run a command on a cluster through Ray Jobs, and print what it prints; keys stay here."""
    words = check(command)
    console = Console()
    with jobs.job_client(address) as client:
        job = jobs.submit(client, words)
        console.print(f"{job}: glad {escape(' '.join(words))}", highlight=False, soft_wrap=True)
        if any(name in os.environ for name in jobs.SECRETS):
            console.print("keys in this environment stay here; the nodes need a role or keys of their own")
        done = not wait or _follow(client, job, console)
    if not done:
        raise typer.Exit(STOPPED)


def check(command: list[str]) -> list[str]:
    """The words of a command that can run as a job, told to use the cluster it runs on.

    Raises:
        GladError: no such command, one that starts no job, or a place that the cluster would not find.
    """
    from pipelines.cli.main import app

    known = typer.main.get_command(app)
    assert isinstance(known, TyperGroup)
    able = {
        name: found
        for name, found in known.commands.items()
        if name != "submit" and any(parameter.name == "address" for parameter in found.params)
    }
    name, *rest = command
    if name not in able:
        raise GladError(f"'{name}' cannot be submitted: give one of {', '.join(sorted(able))} after --")
    context = able[name].make_context(f"glad {name}", list(rest))  # wrong options end here, before anything is sent
    if context.params["address"] is not None:
        raise GladError("a job runs on the cluster it is submitted to: give --address before --, not after it")
    for parameter in able[name].params:
        place = str(context.params.get(parameter.name or "") or "")
        local = place and place != "small" and "://" not in place
        if parameter.name in PLACES and local and not os.path.isabs(place):
            raise GladError(
                f"{place}: the cluster does not know this folder; give an s3:// place or the full path of a folder "
                "that all its machines share"
            )
    return [*command, "--address", "auto"]


def _follow(client: JobSubmissionClient, job: str, console: Console) -> bool:
    """Print what the job prints; False if it failed."""
    try:
        for chunk in jobs.follow(client, job):
            console.print(chunk, end="", markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(f"\n{job} goes on; glad jobs logs {job} --follow, glad jobs stop {job}", highlight=False)
        return True
    info = client.get_job_info(job)
    if info.status.value == "SUCCEEDED":
        return True
    console.print(f"{job} {info.status.value.lower()}", highlight=False)
    return False


jobs_app = typer.Typer(no_args_is_help=True, help="Look at and stop submitted jobs.")


@jobs_app.command("list", epilog="Example: glad jobs list --json")
def list_jobs(
    address: Server = None, as_json: Annotated[bool, typer.Option("--json", help="One line")] = False
) -> None:
    """Submitted jobs, the latest first."""
    with jobs.job_client(address) as client:
        found = jobs.listed(client)
    if as_json:
        print(json.dumps(found))
        return
    table = Table("job", "status", "started", "command")
    for job in found:
        started = datetime.fromtimestamp((job["started"] or 0) / 1000, UTC).isoformat(" ", "minutes")
        table.add_row(job["id"], job["status"], started, escape(job["command"]))
    Console().print(table, highlight=False)


@jobs_app.command(epilog="Example: glad jobs logs raysubmit_x1")
def logs(
    job: Job, address: Server = None, follow: Annotated[bool, typer.Option("--follow", help="To its end")] = False
) -> None:
    """What a job has printed."""
    console, done = Console(), True
    with jobs.job_client(address) as client:
        if follow:
            done = _follow(client, job, console)
        else:
            console.print(client.get_job_logs(job), end="", markup=False, highlight=False, soft_wrap=True)
    if not done:
        raise typer.Exit(STOPPED)


@jobs_app.command(epilog="Example: glad jobs stop raysubmit_x1")
def stop(job: Job, address: Server = None) -> None:
    """Stop a job; what it has committed stays, and `glad jobs retry` goes on from there."""
    with jobs.job_client(address) as client:
        stopped = client.stop_job(job)
    Console().print(f"{job} {'stopped' if stopped else 'was not running'}", highlight=False)


@jobs_app.command(epilog="Example: glad jobs retry raysubmit_x1")
def retry(
    job: Job,
    address: Server = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow what the job prints to its end")] = True,
) -> None:
    """The same command once more; a cut-off `score` or `train` goes on where it was."""
    console = Console()
    with jobs.job_client(address) as client:
        again = jobs.again(client, job)
        console.print(f"{again}: {job} once more", highlight=False)
        done = not wait or _follow(client, again, console)
    if not done:
        raise typer.Exit(STOPPED)


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: glad submit -- score s3://photos/line-4 --out s3://verdicts/monday")(submit)
    app.add_typer(jobs_app, name="jobs")
