"""Exactly-once bookkeeping: the run folder itself records which shards are finished.

    started.json      created exclusively by the job that claims the folder: everything that decides the results
    plan.json         written once the archive is listed: how many images, how many to a shard
    commits/N.json    created exclusively by the driver once every image of shard N is written: the files that hold them
    run.json          written last: every shard is committed, and results/ and errors/ hold nothing else

A shard is a fixed number of consecutive images of the manifest. Tasks write files under names of their own. An image
counts only through the commit of its shard, and only the driver commits. Whatever is killed therefore leaves only files
that no commit names. They are deleted at the end, and the same command resumes with the shards that have no commit.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from cluster.storage import StorageError, is_s3, local_path
from glad_core.errors import GladError
from pipelines.runs.run import Run
from pipelines.runs.schema import COMMITS, COMPLETE, ERRORS, MANIFEST, MEMORY, PLAN, RESULTS, STARTED

SHARDS = 50  # that an archive is cut into, as long as a shard gets no larger than a manifest file
LEAST_ROWS = 8  # images of a shard
READERS = 16  # commits read at a time


@dataclass(frozen=True)
class Plan:
    """How the manifest's ``images`` are cut into shards.

    ``rows_per_shard`` is a power of two that divides the rows of a manifest file. ``run`` is the run's id, which a
    resumed run keeps. ``listed`` is the number of images that each listing task found, in the manifest's order.
    ``blank`` is the number of a list's entries that named nothing.
    """

    images: int
    duplicates: int
    rows_per_shard: int
    run: str
    listed: tuple[int, ...]
    blank: int = 0

    @property
    def shards(self) -> int:
        return -(-self.images // self.rows_per_shard)

    def rows_of(self, shard: int) -> int:
        """Number of images in a shard; the last one may have fewer."""
        return min(self.rows_per_shard, self.images - shard * self.rows_per_shard)

    def stretches(self, done: Container[int], longest: int) -> list[tuple[int, int]]:
        """Manifest positions of the shards that are not ``done``, as (first, last + 1), none longer than ``longest``.

        ``longest`` is a multiple of ``rows_per_shard``; stretches are cut at its multiples.
        """
        stretches: list[tuple[int, int]] = []
        for shard in range(self.shards):
            if shard in done:
                continue
            first = shard * self.rows_per_shard
            end = first + self.rows_of(shard)
            if stretches and stretches[-1][1] == first and first % longest:
                stretches[-1] = (stretches[-1][0], end)
            else:
                stretches.append((first, end))
        return stretches


@dataclass(frozen=True)
class Written:
    """Images of one shard that were written, some of them or all; ``files`` are names relative to the run folder."""

    shard: int
    scored: int
    anomalies: int
    errors: int
    files: tuple[str, ...]


def claim(run: Run, identity: dict[str, Any], overwrite: bool) -> Literal["new", "resumed", "complete"]:
    """Reserve the run folder for this job; this also proves that it can be written.

    Args:
        identity: everything that decides the results; plain JSON values.
        overwrite: delete another run's results first.

    Returns:
        ``resumed`` if an unfinished run of the same identity is there, ``complete`` if a finished one is.

    Raises:
        GladError: the folder holds a run of another identity.
        StorageError: not writable, no such bucket, wrong credentials.
    """
    if run.storage.kind(run.location) == "file":
        raise StorageError(f"{run.location}: a file is in the way; choose another folder")
    taken = [name for name in (COMPLETE, STARTED) if run.has(name)]
    taken += [name for name in (RESULTS, ERRORS, MANIFEST) if run.has(name, "folder")]
    if taken and not overwrite:
        difference = _difference(run, identity) if STARTED in taken else f"not started by `glad score`: {taken[0]}"
        if difference is not None:
            raise GladError(
                f"{run.location} already holds another run ({difference}): choose another --out or give --overwrite"
            )
        return "complete" if COMPLETE in taken else "resumed"
    if taken:
        release(run)
    try:
        created = run.storage.create(run.path(STARTED), (json.dumps(identity, indent=1) + "\n").encode())
    except StorageError as error:
        raise StorageError(f"{run.location} cannot be written; choose another --out ({error})") from error
    if not created:
        raise GladError(f"{run.location}: another run has just started writing there; choose another --out")
    return "new"


def read_identity(run: Run) -> dict[str, Any] | None:
    """The identity of the run that claimed the folder, None if none has.

    Raises:
        GladError: started.json is damaged.
    """
    if not run.has(STARTED):
        return None
    try:
        identity: dict[str, Any] = json.loads(run.storage.read(run.path(STARTED)))
    except ValueError as error:
        raise GladError(f"{run.path(STARTED)}: damaged; give --overwrite to begin anew") from error
    return identity


def _difference(run: Run, identity: dict[str, Any]) -> str | None:
    """How an identity differs from that of the run in the folder, None if it does not."""
    before = read_identity(run) or {}
    for name in [*identity, *before]:
        if identity.get(name) != before.get(name):
            return f"{name} was {_short(before.get(name))}, now {_short(identity.get(name))}"
    return None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def release(run: Run) -> None:
    """Delete everything that runs write, and nothing else that may be in the folder; the claim goes last."""
    run.storage.delete_file(run.path(COMPLETE))
    for name in (COMMITS, RESULTS, ERRORS, MANIFEST):
        run.storage.delete_folder(run.path(name))
    for name in (MEMORY, PLAN, STARTED):
        run.storage.delete_file(run.path(name))


def make_plan(run: Run, listed: Sequence[int], duplicates: int, manifest_rows: int, blank: int = 0) -> Plan:
    """Cut a listed archive into shards: small ones to show progress in a small archive, files worth opening in a large.

    Args:
        listed: number of images from each listing task.
        manifest_rows: rows of a manifest file.
    """
    images = sum(listed)
    wished = max(LEAST_ROWS, images // SHARDS)
    rows = min(manifest_rows, 1 << (wished.bit_length() - 1))
    plan = Plan(images, duplicates, rows, uuid4().hex[:12], tuple(listed), blank)
    run.storage.write(run.path(PLAN), (json.dumps(asdict(plan)) + "\n").encode())
    return plan


def read_plan(run: Run) -> Plan | None:
    """The plan of a run whose archive has been listed, else None."""
    if not run.has(PLAN):
        return None
    values = json.loads(run.storage.read(run.path(PLAN)))
    return Plan(**values | {"listed": tuple(values["listed"])})


def read_commits(run: Run) -> dict[int, Written]:
    """The commits so far, by shard."""
    if not run.has(COMMITS, "folder"):
        return {}
    shards = [int(name.removesuffix(".json")) for name, _ in run.storage.walk(run.path(COMMITS))]
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(shards, pool.map(lambda shard: _read_commit(run, shard), shards), strict=True))


def commit_shards(run: Run, plan: Plan, pieces: Iterable[Written]) -> Iterator[tuple[Written, Written | None]]:
    """Commit each shard when its last piece has been written. Yields every piece, with the commit that it completed.

    If another job has committed a shard meanwhile, that commit holds, and our files of it are swept at the end.
    """
    open_shards: dict[int, list[Written]] = {}
    for piece in pieces:
        parts = open_shards.setdefault(piece.shard, [])
        parts.append(piece)
        commit = None
        if sum(part.scored + part.errors for part in parts) == plan.rows_of(piece.shard):
            commit = _sum(parts)
            if not run.storage.create(_commit_file(run, piece.shard), json.dumps(asdict(commit)).encode()):
                commit = _read_commit(run, piece.shard)
            del open_shards[piece.shard]
        yield piece, commit


def sweep(run: Run, commits: Iterable[Written]) -> int:
    """Delete the files of results/ and errors/ that no commit names; returns how many there were."""
    kept = {file for commit in commits for file in commit.files}
    swept = 0
    for name in (RESULTS, ERRORS):
        folder = run.path(name)
        if not run.has(name, "folder"):
            continue
        for file, _ in list(run.storage.walk(folder)):
            if f"{name}/{file}" not in kept:
                run.storage.delete_file(run.path(name, file))
                swept += 1
        if not is_s3(folder):  # half-written files of killed tasks
            for partial in Path(local_path(folder)).rglob(".*.part"):
                partial.unlink(missing_ok=True)
    return swept


def _sum(parts: Sequence[Written]) -> Written:
    return Written(
        shard=parts[0].shard,
        scored=sum(part.scored for part in parts),
        anomalies=sum(part.anomalies for part in parts),
        errors=sum(part.errors for part in parts),
        files=tuple(file for part in parts for file in part.files),
    )


def _commit_file(run: Run, shard: int) -> str:
    return run.path(COMMITS, f"{shard:08d}.json")


def _read_commit(run: Run, shard: int) -> Written:
    values = json.loads(run.storage.read(_commit_file(run, shard)))
    return Written(**values | {"files": tuple(values["files"])})
