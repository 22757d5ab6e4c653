"""Ray Jobs: commands that run on a cluster, independent of the machine that sent them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import versions
from cluster.session import QUIET, SessionError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

# The submitter's environment variables that travel with a job: where storage is, but no credentials. Those reach the
# nodes by their own role, profile or environment.
PASSED = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"),
    *("AWS_NO_SIGN_REQUEST", "AWS_REQUEST_PAYER"),
)
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
DEFAULT_ADDRESS = "http://127.0.0.1:8265"


@contextmanager
def job_client(address: str | None) -> Iterator[JobSubmissionClient]:
    """A client of a cluster's job server; its errors become one line each.

    If RAY_AUTH_MODE is ``token``, Ray sends the token of RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.

    Args:
        address: the dashboard's URL; None for RAY_API_SERVER_ADDRESS, or the dashboard on this machine.

    Raises:
        SessionError: nothing answers there, the token is missing or wrong, or there is no such job.
    """
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)  # it logs every package sent
    url = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    if "://" not in url:
        url = f"http://{url}"
    try:
        yield JobSubmissionClient(url)
    except AuthenticationError as error:
        raise SessionError(
            f"{url} refused the token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file with its "
            "token (on the head: ray get-auth-token)"
        ) from error
    except ConnectionError as error:
        raise SessionError(
            f"no Ray job server at {url}; check --address (`ray dashboard ray_cluster.yaml` tunnels to a cluster's)"
        ) from error
    except RuntimeError as error:
        text = str(error)
        if "does not exist" in text or "404" in text:
            raise SessionError(f"no such job at {url}; `glad jobs list` names them") from error
        raise SessionError(f"{url}: {text.splitlines()[0][:300] if text else 'no answer'}") from error


def submit(client: JobSubmissionClient, arguments: Sequence[str]) -> str:
    """Run ``glad ARGUMENTS`` on the cluster with the installed code; returns the job's id."""
    root = Path(__file__).parents[1]
    environment = {name: os.environ[name] for name in PASSED if name in os.environ}
    return client.submit_job(
        entrypoint=shlex.join(["python", "-m", "pipelines.cli", *arguments]),
        runtime_env={
            "py_modules": [str(root / name) for name in ("glad_core", "pipelines", "cluster")],
            "env_vars": environment | QUIET | {versions.SENT_FROM: json.dumps(versions.installed())},
        },
        metadata={"glad": shlex.join(arguments)},
    )


def resubmit(client: JobSubmissionClient, job: str) -> str:
    """Run a job's command once more, as a new job; returns its id."""
    details = client.get_job_info(job)
    return client.submit_job(
        entrypoint=details.entrypoint, runtime_env=details.runtime_env, metadata=details.metadata or {}
    )


def full_id(client: JobSubmissionClient, job: str) -> str:
    """The id of the one job whose id begins so, with or without raysubmit_; ``job`` itself if there is none.

    Raises:
        SessionError: several do.
    """
    ids = [known.submission_id or "" for known in client.list_jobs()]
    if job in ids or not job:
        return job
    found = sorted(known for known in ids if known.startswith((job, f"raysubmit_{job}")))
    if len(found) > 1:
        raise SessionError(f"{len(found)} jobs begin with {job}: {', '.join(found[:5])}; give more of the id")
    return found[0] if found else job


def follow(client: JobSubmissionClient, job: str) -> Iterator[str]:
    """The job's output as it is printed, until the job ends. (Ray's own iterator is asynchronous.)"""
    chunks = client.tail_job_logs(job)
    with asyncio.Runner() as runner:
        while True:
            try:
                yield runner.run(anext(chunks))  # type: ignore[arg-type]
            except StopAsyncIteration:
                return


def submitted_jobs(client: JobSubmissionClient) -> list[dict[str, Any]]:
    """Jobs sent by `submit`, the latest first; times in milliseconds since 1970."""
    jobs: list[JobDetails] = [job for job in client.list_jobs() if "glad" in (job.metadata or {})]
    return [
        {
            "id": job.submission_id,
            "status": str(job.status.value),
            "command": (job.metadata or {})["glad"],
            "started": job.start_time,
            "ended": job.end_time,
            "message": job.message,
        }
        for job in sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)
    ]
