"""What the other machines of a cluster have: packages of which versions, and which of this machine's folders."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster import versions
from cluster.locations import is_s3

ANSWER_SECONDS = 60.0  # for every machine to start a process and answer
NAMED = 3  # machines named in a line


class NotShared(Exception):
    """A folder that a job needs on every machine is not there. The message is one line."""


def check_nodes(reads: Sequence[str], writes: Sequence[str]) -> None:
    """Ask every other machine that is up; says on stderr whose packages differ from this machine's.

    Args:
        reads, writes: absolute locations that a job reads and writes on all machines. S3 needs no check.

    Raises:
        NotShared: one of them is a folder of this machine alone.
    """
    import ray

    own = ray.get_runtime_context().get_node_id()
    others = {
        node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != own
    }
    if not others:
        return
    witnesses = {path: _inside(path) for path in reads if not is_s3(path) and os.path.exists(path)}
    probes = {path: probe for path in writes if not is_s3(path) and (probe := _probe(path)) is not None}
    try:
        answers = _ask(others, [*witnesses.values(), *probes.values()])
    finally:
        for probe in probes.values():
            os.unlink(probe)
    _compare(answers, others)
    for path, witness in [*witnesses.items(), *probes.items()]:
        _require(path, [others[node] for node, (_, missing) in answers.items() if witness in missing])


def _inside(path: str) -> str:
    """Something in a folder, which another machine's folder of the same name does not have; else the path itself."""
    if not os.path.isdir(path):
        return path
    with os.scandir(path) as entries:
        return next((entry.path for entry in entries), path)


def _probe(path: str) -> str | None:
    """A new file in the folder ``path``, or in the nearest one above it; None if none can be made."""
    folder = next(folder for folder in (Path(path), *Path(path).parents) if folder.is_dir())
    probe = folder / f".glad-probe-{uuid.uuid4().hex}"
    try:
        probe.touch(exist_ok=False)
    except OSError:
        return None  # the job itself says so
    return str(probe)


def _look(names: list[str], paths: list[str]) -> tuple[dict[str, str], list[str]]:
    """On another machine: its versions, and which of the paths it does not have."""
    return versions.installed(names), [path for path in paths if not os.path.exists(path)]


def _ask(others: dict[str, str], paths: list[str]) -> dict[str, Any]:
    """The answers of `_look` by node; those that do not answer in time are left out, in a line."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Any = ray.remote(num_cpus=0, max_retries=0)(_look)
    names = list(versions.COMPARED[1:])
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(names, paths): node
        for node in others
    }
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
    answers = {}
    for answer in done:
        with suppress(ray.exceptions.RayError):  # a machine that is lost, or has none of our code
            answers[asked[answer]] = ray.get(answer)
    silent = [others[node] for node in others if node not in answers]
    if silent:
        print(f"{_named(silent)}: no answer about packages and folders there", file=sys.stderr, flush=True)
    return answers


def _compare(answers: dict[str, Any], others: dict[str, str]) -> None:
    """Print whose versions differ from this machine's, a line for each difference."""
    ours = versions.installed(list(versions.COMPARED[1:]))
    groups: dict[str, list[str]] = {}
    for node, (theirs, _) in answers.items():
        groups.setdefault(versions.differences(theirs, ours, "here"), []).append(others[node])
    for different, addresses in sorted(groups.items()):
        if different:
            print(f"{_named(addresses)}: {different}; scores may differ a little", file=sys.stderr, flush=True)


def _require(path: str, missing: list[str]) -> None:
    if missing:
        raise NotShared(
            f"{path}: {_named(missing)} of the cluster cannot see it; give an s3:// location, or a folder that all "
            "its machines share"
        )


def _named(addresses: list[str]) -> str:
    more = len(addresses) - NAMED
    return ", ".join(addresses[:NAMED]) + (f" and {more} more" if more > 0 else "")
