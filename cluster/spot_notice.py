"""Tells Ray, two minutes ahead, that AWS takes this machine away; nothing more is then started on it.

    python -m cluster.spot_notice HEAD:6379      # after `ray start` on every worker; ends with the notice, or with Ray

AWS announces the end of a spot machine in the machine's own metadata (EC2 user guide, "Spot Instance interruption
notices"). Ray Data gives no work to actors of a node that drains.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import typer

METADATA = "http://169.254.169.254/latest"
EVERY = 5.0  # seconds between two questions, as AWS recommends
NOTICE = 110  # seconds that are left when the notice is read
ANSWER = 5.0  # seconds for the metadata service to answer


def is_noticed(metadata: str = METADATA) -> bool:
    """Whether this machine is about to be stopped or terminated.

    Raises:
        OSError: there is no metadata service, so this is no machine of AWS.
    """
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    with urlopen(Request(f"{metadata}/api/token", method="PUT", headers=lifetime), timeout=ANSWER) as answer:
        token = answer.read().decode()
    asked = Request(f"{metadata}/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token})
    try:
        with urlopen(asked, timeout=ANSWER):
            return True
    except HTTPError as error:
        if error.code == 404:  # nothing is announced
            return False
        raise


def node_id() -> str | None:
    """The id of this machine's Ray node, in hexadecimal; None if Ray does not run."""
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet":
            for word in process.info["cmdline"] or []:
                if word.startswith("--node_id="):
                    return word.partition("=")[2]
    return None


def drain_command(address: str, node: str) -> list[str]:
    """The command that has Ray drain a node.

    Without the id it would start, or join, a Ray to ask for that of its own node.
    """
    ray = str(Path(sys.executable).with_name("ray"))
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "AWS takes the spot machine away"]
    return [
        ray,
        "drain-node",
        "--address",
        address,
        "--node-id",
        node,
        *reason,
        "--deadline-remaining-seconds",
        str(NOTICE),
    ]


def main(
    address: Annotated[str, typer.Argument(help="the head's host:port")],
    metadata: Annotated[str, typer.Option(help="the metadata service")] = METADATA,
) -> None:
    """Wait for the notice as long as Ray runs here, then drain."""
    while node := node_id():
        try:
            if is_noticed(metadata):
                raise typer.Exit(subprocess.run(drain_command(address, node), check=False).returncode)
        except OSError as error:  # also a moment without an answer
            print(f"{metadata}: {error}", file=sys.stderr, flush=True)
        time.sleep(EVERY)


if __name__ == "__main__":
    typer.run(main)
