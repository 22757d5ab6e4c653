"""Tells Ray, two minutes ahead, that AWS takes this machine away; nothing more is then started on it.

    python -m cluster.spot_notice HEAD:6379      # beside `ray start` on every worker; ends with the notice

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


def drain_command(address: str) -> list[str]:
    """The command that has Ray drain this machine's node."""
    ray = str(Path(sys.executable).with_name("ray"))
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "AWS takes the spot machine away"]
    return [ray, "drain-node", "--address", address, *reason, "--deadline-remaining-seconds", str(NOTICE)]


def main(
    address: Annotated[str, typer.Argument(help="the head's host:port")],
    metadata: Annotated[str, typer.Option(help="the metadata service")] = METADATA,
) -> None:
    """Wait for the notice, then drain."""
    while True:
        try:
            if is_noticed(metadata):
                break
        except OSError as error:  # also a moment without an answer
            print(f"{metadata}: {error}", file=sys.stderr, flush=True)
        time.sleep(EVERY)
    raise typer.Exit(subprocess.run(drain_command(address), check=False).returncode)


if __name__ == "__main__":
    typer.run(main)
