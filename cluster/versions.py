"""Versions of packages: on this machine, where a job was sent from, and on other machines. Needs Python alone."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from importlib import metadata

DISTRIBUTION = "glad-ray"
OLDEST_PYTHON = (3, 11)
COMPARED = ("Python", "ray", "torch", "diffusers", "timm", "pyarrow", "numpy")  # what results may depend on
SENT_FROM = "GLAD_SENT_FROM"  # environment variable of a submitted job: `installed` of its sender, as JSON
MISSING = "none"


def installed(packages: list[str] | None = None) -> dict[str, str]:
    """Versions of Python and of ``packages``, by default those that the project needs; "none" for what is missing."""
    versions = {"Python": platform.python_version()}
    for name in required() if packages is None else packages:
        try:
            versions[name] = metadata.version(name).partition("+")[0]  # torch's +cpu and +cu128 are one version
        except metadata.PackageNotFoundError:
            versions[name] = MISSING
    return versions


def required() -> list[str]:
    """Names of the packages that the project needs."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # a folder of source
        lines = list(COMPARED[1:])
    return [re.split(r"[^A-Za-z0-9._-]", line)[0] for line in lines if "extra ==" not in line]


def differences(theirs: dict[str, str], ours: dict[str, str], here: str) -> str:
    """What ``theirs`` has in other versions: ``torch 2.6.0 (here 2.8.0)``; empty if nothing that results depend on."""
    return ", ".join(
        f"{name} {theirs[name]} ({here} {ours[name]})"
        for name in COMPARED
        if name in theirs and name in ours and theirs[name] != ours[name]
    )


def check_sent_job() -> None:
    """Compare this machine with the sender's, if this process is a submitted job, in a line on stderr.

    Raises:
        SystemExit: Python is too old, or packages are missing.
    """
    text = os.environ.get(SENT_FROM)
    if text is None:
        return
    theirs = json.loads(text)
    ours = installed([name for name in theirs if name != "Python"])
    missing = [name for name, version in ours.items() if version == MISSING and theirs[name] != MISSING]
    if sys.version_info < OLDEST_PYTHON or missing:
        wrong = f"has no {', '.join(missing)}" if missing else f"has Python {ours['Python']}, too old"
        print(
            f"Error: the cluster {wrong} ({sys.executable}): install on its machines what the sender has: "
            f"Python {theirs['Python']}, ray {theirs['ray']} and the rest of glad-ray's packages",
            file=sys.stderr,
        )
        raise SystemExit(2)
    different = differences(ours, theirs, "the sender")
    if different:
        print(f"the cluster has {different}: scores may differ a little", file=sys.stderr, flush=True)
