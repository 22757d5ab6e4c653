"""Exactly once: what of a run is done, kept in DEST itself.

    started.json      made exclusively by the run that claims DEST: what was asked
    plan.json         the archive is listed: how many images, how many to a shard
    commits/N.json    made exclusively by the driver once every image of shard N is written: the files that hold them
    run.json          all shards are committed, and nothing else is left in results/ and errors/

A shard is so many consecutive images of the manifest. Tasks write files under names of their own; an image counts only
through the commit of its shard, and only a driver commits. So whatever is killed leaves files that nobody refers to,
which are swept at the end, and the same command goes on with the shards that have no commit.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from cluster.storage import Storage, StorageError, is_s3, join, local_path
from glad_core.errors import GladError
from pipelines.runs.schema import COMPLETE, ERRORS, MANIFEST, MEMORY, RESULTS, STARTED

PLAN, COMMITS = "plan.json", "commits"
PARTS = 50  # shards that a small archive is cut into
READERS = 16  # commits read at a time


@dataclass(frozen=True)
class Plan:
    """``images`` of the manifest in shards of ``rows_per_shard``, a power of two that divides a manifest file.

    ``run`` is the run's id: the same for all that go on with it. ``listed`` is how many images each listing task found,
    in the manifest's order.
    """

    images: int
    duplicates: int
    rows_per_shard: int
    run: str = ""
    listed: tuple[int, ...] = ()

    @property
    def shards(self) -> int:
        return -(-self.images // self.rows_per_shard)

    def rows_of(self, shard: int) -> int:
        """How many images a shard has: the last one may have fewer."""
        return min(self.rows_per_shard, self.images - shard * self.rows_per_shard)

    def stretches(self, done: Container[int], longest: int) -> list[tuple[int, int]]:
        """Where the shards not ``done`` are in the manifest, as (first, last + 1), none longer than ``longest``.

        ``longest`` is a multiple of ``rows_per_shard``; stretches are cut at its multiples.
        """
        found: list[tuple[int, int]] = []
        for shard in range(self.shards):
            if shard in done:
                continue
            first = shard * self.rows_per_shard
            end = first + self.rows_of(shard)
            if found and found[-1][1] == first and first % longest:
                found[-1] = (found[-1][0], end)
            else:
                found.append((first, end))
        return found


@dataclass(frozen=True)
class Written:
    """Images of one shard that were written: by one task, or all of them. ``files`` are names below DEST."""

    shard: int
    scored: int
    anomalies: int
    errors: int
    files: tuple[str, ...]


def claim(dest: str, storage: Storage, asked: dict[str, Any], overwrite: bool) -> Literal["new", "resumed", "complete"]:
    """Make DEST this run's own; also the proof that it can be written.

    Returns:
        ``resumed`` where the same was asked before and not finished, ``complete`` where it was.

    Raises:
        GladError: something else was asked there before.
        StorageError: not writable, no such bucket, wrong credentials.
    """
    if storage.kind(dest) == "file":
        raise StorageError(f"{dest}: a file is in the way; choose another folder")
    text = (json.dumps(asked, indent=1) + "\n").encode()
    taken = [name for name in (COMPLETE, STARTED) if storage.kind(join(dest, name)) == "file"]
    taken += [name for name in (RESULTS, ERRORS, MANIFEST) if storage.kind(join(dest, name)) == "folder"]
    if taken and not overwrite:
        difference = (
            _difference(dest, storage, asked) if STARTED in taken else f"not started by `glad score`: {taken[0]}"
        )
        if difference is not None:
            raise GladError(
                f"{dest} already holds another run ({difference}): choose another --out or give --overwrite"
            )
        return "complete" if COMPLETE in taken else "resumed"
    if taken:
        release(dest, storage)
    try:
        mine = storage.create(join(dest, STARTED), text)
    except StorageError as error:
        raise StorageError(f"{dest} cannot be written; choose another --out ({error})") from error
    if not mine:
        raise GladError(f"{dest}: another run has just started writing there; choose another --out")
    return "new"


def read_asked(dest: str, storage: Storage) -> dict[str, Any] | None:
    """What was asked of the run in DEST, None where none was started.

    Raises:
        GladError: damaged.
    """
    place = join(dest, STARTED)
    if storage.kind(place) != "file":
        return None
    try:
        asked: dict[str, Any] = json.loads(storage.read(place))
    except ValueError as error:
        raise GladError(f"{place}: damaged; give --overwrite to begin anew") from error
    return asked


def _difference(dest: str, storage: Storage, asked: dict[str, Any]) -> str | None:
    """What was asked otherwise when DEST was claimed, None if nothing was."""
    before = read_asked(dest, storage) or {}
    for name in [*asked, *before]:
        if asked.get(name) != before.get(name):
            return f"{name} was {_short(before.get(name))}, now {_short(asked.get(name))}"
    return None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def release(dest: str, storage: Storage) -> None:
    """Remove what runs write, and nothing else that may be in DEST; the claim goes last."""
    storage.delete_file(join(dest, COMPLETE))
    for name in (COMMITS, RESULTS, ERRORS, MANIFEST):
        storage.delete_folder(join(dest, name))
    for name in (MEMORY, PLAN, STARTED):
        storage.delete_file(join(dest, name))


def make_plan(listed: Sequence[int], duplicates: int, dest: str, storage: Storage, manifest_rows: int) -> Plan:
    """Cut a listed archive into shards: small ones for progress in a small archive, files worth opening in a large."""
    images = sum(listed)
    wanted = max(8, images // PARTS)
    rows = min(manifest_rows, 1 << (wanted.bit_length() - 1))
    plan = Plan(images, duplicates, rows, uuid4().hex[:12], tuple(listed))
    storage.write(join(dest, PLAN), (json.dumps(asdict(plan)) + "\n").encode())
    return plan


def read_plan(dest: str, storage: Storage) -> Plan | None:
    """The plan of a run whose archive has been listed."""
    if storage.kind(join(dest, PLAN)) != "file":
        return None
    values = json.loads(storage.read(join(dest, PLAN)))
    return Plan(**values | {"listed": tuple(values.get("listed", [values["images"]]))})


def read_commits(dest: str, storage: Storage) -> dict[int, Written]:
    """Every shard committed so far."""
    folder = join(dest, COMMITS)
    if storage.kind(folder) != "folder":
        return {}
    shards = [int(name.removesuffix(".json")) for name, _ in storage.walk(folder)]
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(shards, pool.map(lambda shard: _read_commit(dest, storage, shard), shards), strict=True))


def commit(
    pieces: Iterable[Written], plan: Plan, dest: str, storage: Storage
) -> Iterator[tuple[Written, Written | None]]:
    """Commit each shard when its last piece has been written. Yields every piece, with the commit if it made one.

    A shard that somebody else has committed meanwhile keeps that commit; ours is left for the sweep.
    """
    open_shards: dict[int, list[Written]] = {}
    for piece in pieces:
        parts = open_shards.setdefault(piece.shard, [])
        parts.append(piece)
        made = None
        if sum(part.scored + part.errors for part in parts) == plan.rows_of(piece.shard):
            made = Written(
                piece.shard,
                sum(part.scored for part in parts),
                sum(part.anomalies for part in parts),
                sum(part.errors for part in parts),
                tuple(file for part in parts for file in part.files),
            )
            if not storage.create(_commit_file(dest, piece.shard), json.dumps(asdict(made)).encode()):
                made = _read_commit(dest, storage, piece.shard)
            del open_shards[piece.shard]
        yield piece, made


def sweep(commits: Iterable[Written], dest: str, storage: Storage) -> int:
    """Delete the files of results/ and errors/ that no commit names; returns how many there were."""
    kept = {file for of in commits for file in of.files}
    swept = 0
    for folder in (RESULTS, ERRORS):
        place = join(dest, folder)
        if storage.kind(place) != "folder":
            continue
        for name, _ in list(storage.walk(place)):
            if f"{folder}/{name}" not in kept:
                storage.delete_file(join(place, name))
                swept += 1
        if not is_s3(dest):  # half-written files of tasks that were killed
            for partial in Path(local_path(place)).rglob(".*.part"):
                partial.unlink(missing_ok=True)
    return swept


def _commit_file(dest: str, shard: int) -> str:
    return join(dest, COMMITS, f"{shard:08d}.json")


def _read_commit(dest: str, storage: Storage, shard: int) -> Written:
    values = json.loads(storage.read(_commit_file(dest, shard)))
    return Written(**values | {"files": tuple(values["files"])})
