"""Commands about a cluster: submit, jobs, cluster check."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from cluster import jobs
from glad_core.errors import GladError
from pipelines.cli.config_file import origin
from pipelines.cli.errors import STOPPED
from pipelines.cli.options import Json, print_json
from pipelines.cli.stopping import says_if_stopped

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

commands = typer.Typer()
jobs_app = typer.Typer(no_args_is_help=True, help="List, follow, stop and repeat submitted jobs.")
cluster_app = typer.Typer(no_args_is_help=True, help="Check cluster files.")

Server = Annotated[
    str | None,
    typer.Option(help="URL of the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265"),
]
Job = Annotated[str, typer.Argument(help="Id of the job, raysubmit_..., or how one begins")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Print the job's output until it ends")]
# Parameters of commands that hold a location, which the nodes of a cluster have to find as well.
LOCATIONS = (
    *("source", "dataset", "out", "model", "base", "good", "run", "textures", "exclude", "include", "storage"),
    *("results", "first", "second", "plain", "settings"),
)
MOST_NARROW = 80  # columns of `glad jobs list`, in which an id fits whole
# Commands without Ray that read results where they are: a job on one machine of the cluster.
READERS = ("drift", "show")


@commands.command(
    epilog="Example: glad submit -- score s3://photos/line-4 --model s3://models/board --out s3://verdicts/monday"
)
def submit(
    ctx: typer.Context,
    command: Annotated[list[str], typer.Argument(help="The command to run, after -- and without `glad`")],
    address: Server = None,
    wait: Wait = True,
) -> None:
    """Run a command on a cluster as a Ray job and print its output. Credentials are not sent."""
    words = check(command, ctx.find_root())
    console = Console()
    with jobs.job_client(address) as client:
        job = jobs.submit(client, words)
        console.print(f"{job}: glad {escape(' '.join(words))}", highlight=False, soft_wrap=True)
        if any(name in os.environ for name in jobs.SECRETS):
            console.print("credentials in this environment are not sent; the nodes need a role or keys of their own")
        succeeded = not wait or _follow(client, job, console)
    if not succeeded:
        raise typer.Exit(STOPPED)


def check(command: list[str], root: Any) -> list[str]:
    """The words of a command that can run as a job, with the option to use the cluster it runs on.

    Options that this machine's glad.yaml and environment set are added, since the cluster has neither.

    Args:
        root: the context of the `glad` command group.

    Raises:
        GladError: no such command, one that starts no job, or a location that the cluster would not find.
    """
    submittable = {
        name: known
        for name, known in root.command.commands.items()
        if name in READERS or (name != "submit" and any(parameter.name == "address" for parameter in known.params))
    }
    name, *rest = command
    if name not in submittable:
        raise GladError(f"'{name}' cannot be submitted: give one of {', '.join(sorted(submittable))} after --")
    context = submittable[name].make_context(name, list(rest), parent=root)  # raises if an option is wrong
    if "address" in context.params and origin(context, "address") == "flag":
        raise GladError("a job runs on the cluster it is submitted to: give --address before --, not after it")
    if name == "score" and context.params["out"] is None:
        raise GladError("give --out: a submitted job writes its results there")
    for parameter in LOCATIONS:
        location = str(context.params.get(parameter) or "")
        is_local = location and location != "small" and "://" not in location
        if is_local and not os.path.isabs(location):
            raise GladError(
                f"{location}: the cluster does not know this folder; give an s3:// location or the full path of a "
                "folder that all its machines share"
            )
    words = [*command, *_words_from_elsewhere(context)]
    return words if name in READERS else [*words, "--address", "auto"]


def _words_from_elsewhere(context: Any) -> list[str]:
    """The options of a command that are neither given on the command line nor defaults, as words."""
    words = []
    for parameter in context.command.params:
        value = context.params.get(parameter.name)
        if origin(context, parameter.name) not in ("environment", "file") or parameter.name == "address":
            continue
        if getattr(parameter, "is_flag", False):
            words += (parameter.opts if value else parameter.secondary_opts)[:1]
        elif value is not None:
            words += [f"{parameter.opts[0]}={value}"] if parameter.param_type_name == "option" else [str(value)]
    return words


def _follow(client: JobSubmissionClient, job: str, console: Console) -> bool:
    """Print the job's output until it ends; False if the job failed."""
    with says_if_stopped(f"{job} keeps running: glad jobs logs {job} --follow, glad jobs stop {job}"):
        for chunk in jobs.follow(client, job):
            console.print(chunk, end="", markup=False, highlight=False, soft_wrap=True)
    info = client.get_job_info(job)
    if info.status.value == "SUCCEEDED":
        return True
    console.print(f"{job} {info.status.value.lower()}", highlight=False)
    return False


@jobs_app.command("list", epilog="Example: glad jobs list --json")
def list_jobs(address: Server = None, as_json: Json = False) -> None:
    """List submitted jobs, the latest first."""
    with jobs.job_client(address) as client:
        rows = jobs.submitted_jobs(client)
    if as_json:
        print_json(rows)
        return
    # No id is cut, however narrow the terminal; the command, which may be long, takes the lines it needs.
    table = Table(Column("job", no_wrap=True), "status", "started", Column("command", overflow="fold"))
    for row in rows:
        started = datetime.fromtimestamp((row["started"] or 0) / 1000, UTC).isoformat(" ", "minutes")
        table.add_row(row["id"], row["status"], started, escape(row["command"]))
    console = Console()
    console.print(table, highlight=False, width=max(console.width, MOST_NARROW))


@jobs_app.command(epilog="Example: glad jobs logs raysubmit_x1")
def logs(
    job: Job,
    address: Server = None,
    follow: Annotated[bool, typer.Option("--follow", help="Keep printing until the job ends")] = False,
) -> None:
    """Print the output of a job."""
    console, succeeded = Console(), True
    with jobs.job_client(address) as client:
        job = jobs.full_id(client, job)
        if follow:
            succeeded = _follow(client, job, console)
        else:
            console.print(client.get_job_logs(job), end="", markup=False, highlight=False, soft_wrap=True)
    if not succeeded:
        raise typer.Exit(STOPPED)


@jobs_app.command(epilog="Example: glad jobs stop raysubmit_x1")
def stop(job: Job, address: Server = None) -> None:
    """Stop a job. Finished work is kept, and `glad jobs retry` resumes from it."""
    with jobs.job_client(address) as client:
        job = jobs.full_id(client, job)
        stopped = client.stop_job(job)
    Console().print(f"{job} {'stopped' if stopped else 'was not running'}", highlight=False)


@jobs_app.command(epilog="Example: glad jobs retry raysubmit_x1")
def retry(job: Job, address: Server = None, wait: Wait = True) -> None:
    """Submit the command of a job again. An interrupted `score` or `train` resumes."""
    console = Console()
    with jobs.job_client(address) as client:
        job = jobs.full_id(client, job)
        new_job = jobs.resubmit(client, job)
        console.print(f"{new_job}: {job} again", highlight=False)
        succeeded = not wait or _follow(client, new_job, console)
    if not succeeded:
        raise typer.Exit(STOPPED)


@cluster_app.command("check", epilog="Example: glad cluster check ray_cluster.yaml")
def cluster_check(
    file: Annotated[Path, typer.Argument(help="File for `ray up` or KubeRay, such as ray_cluster.yaml")],
) -> None:
    """Find errors in a cluster file, and example values still in it (exit code 1), before any machine starts."""
    from cluster.check_file import check_cluster_file

    findings = check_cluster_file(file)
    console = Console()
    kinds = (("[red]wrong[/red] ", findings.problems), ("[yellow]change[/yellow]", findings.examples))
    for kind, lines in (*kinds, ("note  ", findings.notes)):
        for line in lines:
            console.print(f"{kind} {escape(line)}", highlight=False, soft_wrap=True)
    if findings.problems or findings.examples:
        raise typer.Exit(STOPPED)
    console.print("nothing wrong found", highlight=False)


commands.add_typer(jobs_app, name="jobs")
commands.add_typer(cluster_app, name="cluster")
