"""Exactly-once bookkeeping: the run folder itself records which shards are finished.

    plan.json          claims the folder for a run, once its archive is listed (`pipelines.runs.claim`)
    staging/           files that tasks have written, under names of their own; they count for nothing
    commits/N.json     created exclusively by a driver once every image of shard N is staged: which files hold them
    results/, errors/  those files and no others, linked there after their commit
    record.json        created exclusively once every shard is committed: what run.json is to say
    run.json           that file, linked there last: the run is complete

A shard is a fixed number of consecutive images of the manifest. An image counts through the commit of its shard alone.
Whoever is killed or stopped, and however many drivers there are, a shard has one commit, and only files of commits
reach results/ and errors/. Everything a job does can be done again by the next.
"""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from glad_core.errors import GladError
from pipelines.runs.claim import Plan, check_in_force, mark_cleared, numbered, older_plans, repair
from pipelines.runs.run import Run, generation_of, parse_record
from pipelines.runs.schema import COMMITS, COMPLETE, ERRORS, FILE, MANIFEST, RECORD, RESULTS, STAGING

MOST_COMMITS = 32  # under way at a time
ATTEMPT = re.compile(rf"{STAGING}/(\d+)-[0-9a-f]+")


@dataclass(frozen=True)
class Written:
    """Images of one shard that were written, some of them or all.

    ``files`` are names relative to the run folder, of these ``sizes`` in bytes. Until they are published, they lie
    below ``staged``, a folder of the run.
    """

    shard: int
    scored: int
    anomalies: int
    errors: int
    staged: str
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    doubtful: int = 0  # of the scored
    pages: int = 0  # of the scored and the errors: pages after the first of their file
    shard_pages: int = 0  # such pages in the whole shard
    unjudged: int = 0  # pages of these files that are neither
    at: float = field(default=0.0, compare=False)  # seconds since 1970, of a commit by its driver's clock; 0: unknown

    @property
    def done(self) -> int:
        """Files whose first page is scored or an error."""
        return self.scored + self.errors - self.pages

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Written:
        """A `WRITTEN_SCHEMA` row."""
        return cls(**row | {name: tuple(row[name]) for name in ("files", "sizes")})


@dataclass(frozen=True)
class _Commit(Written):
    """A commit as it is stored: with the id of its run, in case files of another run have been left in the folder."""

    run: str = field(kw_only=True)


_COMMIT = TypeAdapter(_Commit)


def recover(run: Run, plan: Plan) -> tuple[Plan, dict[int, Written]]:
    """Take over what earlier jobs have done: delete older runs, and put every committed file in its place.

    Returns:
        The plan to go on with and the commits by shard. If files of commits are missing or damaged, or commits
        themselves are, the plan is a new generation in which their shards have no commit.

    Raises:
        GladError: another command has begun anew in the folder.
        StorageError: storage cannot be used.
    """
    while True:
        _clear_older(run, plan)
        found = _read(run, plan)
        was_complete = is_complete(run, plan)  # asked first: if it is, the record has been there for longer
        record = run.storage.read_all([run.path(numbered(RECORD, plan.generation))])[0]
        was_complete = was_complete or record is not None
        if was_complete:  # so every commit must be there, whatever a listing shows
            found = dict.fromkeys(range(plan.shards)) | _read(run, plan, every=True)
        commits = {shard: commit for shard, commit in found.items() if commit is not None}
        if commits:
            check_in_force(run, plan)
        present = _sizes(run) if commits else {}
        published = [shard for shard, commit in commits.items() if _publish(run, commit, present)]
        if len(published) == len(found) and (not was_complete or parse_record(record or b"") is not None):
            return plan, commits
        plan = repair(run, plan, sorted(found.keys() - set(published)))


def read_commits(run: Run, plan: Plan) -> dict[int, Written]:
    """The commits so far, by shard."""
    return {shard: commit for shard, commit in _read(run, plan).items() if commit is not None}


def commit_shards(
    run: Run, plan: Plan, pieces: Iterable[Written], pool: Executor | None = None
) -> Iterator[tuple[Written, Written | None]]:
    """Commit each shard when its last piece has been written, and publish its files.

    Yields every piece, with the commit that it completed. If another job has committed a shard meanwhile, that commit
    holds, and our files of it are deleted at the end. If another job has completed the run, this ends.

    Args:
        pool: commits shards side by side, since a commit on S3 is half a dozen requests, one after the other.

    Raises:
        GladError: another command has begun anew in the folder; committed files have been deleted.
    """
    open_shards: dict[int, list[Written]] = {}
    names = plan.commit_names()
    under_way: deque[tuple[Written, Future[tuple[Written, bool]] | None]] = deque()

    def finished(at_most: int) -> Iterator[tuple[Written, Written | None]]:
        while under_way and (len(under_way) > at_most or under_way[0][1] is None or under_way[0][1].done()):
            piece, future = under_way.popleft()
            commit, ours = future.result() if future is not None else (None, True)
            if not ours and is_complete(run, plan):
                raise _Completed
            yield piece, commit

    try:
        for piece in pieces:
            parts = open_shards.setdefault(piece.shard, [])
            parts.append(piece)
            future = None
            if sum(part.scored + part.errors for part in parts) == plan.rows_of(piece.shard) + piece.shard_pages:
                future = _submit(pool, _commit, run, plan, names[piece.shard], open_shards.pop(piece.shard))
            under_way.append((piece, future))
            yield from finished(MOST_COMMITS)
        yield from finished(0)
    except _Completed:
        return


class _Completed(Exception):
    """Another job has completed the run."""


def _submit(pool: Executor | None, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    if pool is not None:
        return pool.submit(function, *arguments)
    done: Future[Any] = Future()
    done.set_result(function(*arguments))
    return done


def complete(run: Run, plan: Plan, commits: Mapping[int, Written], record: dict[str, Any]) -> None:
    """Finish a run all of whose shards are committed: delete what no commit names, and put run.json in its place.

    Args:
        record: what run.json says, besides what this adds: run, generation, listings, number and bytes of the files. If
            another job was first, its record holds.

    Raises:
        GladError: another command has begun anew in the folder; committed files have been deleted.
    """
    kept = {file: size for commit in commits.values() for file, size in zip(commit.files, commit.sizes, strict=True)}
    _sweep(run, plan, kept)
    files = {
        name: {"files": len(sizes), "bytes": sum(sizes)}
        for name in (RESULTS, ERRORS)
        for sizes in [[size for file, size in kept.items() if file.startswith(f"{name}/")]]
    }
    record = record | {"run": plan.run, "generation": plan.generation, "files": files}
    record |= {"listings": [listing.name for listing in plan.listings]}
    committed = run.path(numbered(RECORD, plan.generation))
    data = (json.dumps(record, indent=1) + "\n").encode()
    if not run.storage.create(committed, data):
        data = run.storage.read_all([committed])[0] or b""
    check_in_force(run, plan)
    run.storage.link(committed, run.path(COMPLETE))
    if run.storage.read_all([run.path(COMPLETE)]) != [data]:
        raise GladError(f"{run.path(COMPLETE)} has been changed; give the same command again")


def is_complete(run: Run, plan: Plan) -> bool:
    """Whether run.json says that the run of this plan is complete."""
    return generation_of(_record(run)) == plan.generation


def is_whole(run: Run, plan: Plan) -> bool:
    """Whether the run is complete, and the files that run.json counts are there."""
    record = _record(run)
    return generation_of(record) == plan.generation and run.problem_of_files(record or {}) is None


def _record(run: Run) -> dict[str, Any] | None:
    data = run.storage.read_all([run.path(COMPLETE)])[0]
    return None if data is None else parse_record(data)


def _commit(run: Run, plan: Plan, name: str, parts: Sequence[Written]) -> tuple[Written, bool]:
    """Commit a shard and publish it; returns the commit in force and whether it is ours."""
    written = _sum(parts)
    file = run.path(COMMITS, name)
    ours = run.storage.create(file, json.dumps(asdict(written) | {"run": plan.run, "at": int(time.time())}).encode())
    if not ours:
        theirs = _parsed(run.storage.read_all([file])[0], plan, written.shard)
        if theirs is None:
            raise GladError(f"{file}: damaged; give the same command again, which scores its images anew")
        ours = theirs == written  # the server created it and then reported a failure
        written = theirs
    check_in_force(run, plan)
    if not _publish(run, written, {}):
        raise GladError(f"{run.location}: files of {name} have been deleted; give the same command again")
    return written, ours


def _publish(run: Run, commit: Written, present: Mapping[str, int]) -> bool:
    """Put a commit's files in their places, unless they are ``present``; False if one is nowhere."""
    for file, size in zip(commit.files, commit.sizes, strict=True):
        if file not in present:
            staged = run.path(commit.staged, file)
            if run.storage.link(staged, run.path(file)):
                run.storage.delete_file(staged)
            elif not run.storage.holds(run.path(file), size):
                return False
        elif present[file] != size:
            return False
    return True


def _read(run: Run, plan: Plan, every: bool = False) -> dict[int, Written | None]:
    """The commits by shard; None for one that is damaged or another run's. Other files among them are not ours.

    Args:
        every: ask for every commit, not for those that a listing shows.
    """
    names = plan.commit_names()
    if not every:
        shown = {name for name, _ in run.storage.walk(run.path(COMMITS))} if run.has(COMMITS, "folder") else set()
        names = [name if name in shown else "" for name in names]
    shards = [shard for shard, name in enumerate(names) if name]
    contents = run.storage.read_all([run.path(COMMITS, names[shard]) for shard in shards])
    return {shard: _parsed(data, plan, shard) for shard, data in zip(shards, contents, strict=True) if data is not None}


def _parsed(data: bytes | None, plan: Plan, shard: int) -> Written | None:
    commit = _stored(data)
    if commit is None or (commit.run, commit.shard) != (plan.run, shard):
        return None
    expected = plan.rows_of(shard) + commit.shard_pages
    if commit.scored + commit.errors != expected or len(commit.files) != len(commit.sizes):
        return None
    return Written(**{name: value for name, value in vars(commit).items() if name != "run"})


def _stored(data: bytes | None) -> _Commit | None:
    try:
        commit = _COMMIT.validate_json(data or b"")
    except ValidationError:
        return None
    inside = all(FILE.fullmatch(file) and ".." not in file.split("/") for file in commit.files)
    return commit if inside and ATTEMPT.fullmatch(commit.staged) else None


def _sizes(run: Run) -> dict[str, int]:
    """Every file in results/ and errors/, and its bytes."""
    folders = [name for name in (RESULTS, ERRORS) if run.has(name, "folder")]
    return {f"{name}/{file}": size for name in folders for file, size in run.storage.walk(run.path(name))}


def _sweep(run: Run, plan: Plan, kept: Mapping[str, int]) -> None:
    """Delete files of ours in results/, errors/ and staging/ that are not ``kept``, but none of a later generation.

    Raises:
        GladError: one that is to be kept is missing.
    """
    sizes = _sizes(run)
    run.storage.delete_files(
        run.path(file)
        for file in sizes
        if (part := FILE.fullmatch(file)) and int(part[1] or 0) <= plan.generation and file not in kept
    )
    for folder in run.storage.folders(run.path(STAGING)):
        attempt = ATTEMPT.fullmatch(f"{STAGING}/{folder}")
        if attempt and int(attempt[1]) <= plan.generation:
            run.storage.delete_folder(run.path(STAGING, folder))
    for file, size in kept.items():
        if sizes.get(file) != size and not run.storage.holds(run.path(file), size):
            raise GladError(f"{run.path(file)} has been deleted or changed; give the same command again")


def _clear_older(run: Run, plan: Plan) -> None:
    """Delete what generations before this one have left, so that none of their jobs can put anything in its place."""
    run.storage.delete_files(run.path(numbered(RECORD, older)) for older in range(1, plan.generation))
    data = run.storage.read_all([run.path(COMPLETE)])[0]
    if data is not None and generation_of(parse_record(data)) < plan.generation:
        run.storage.delete_file(run.path(COMPLETE), only=data)
    for generation, old in older_plans(run, plan):
        _delete_run(run, generation, old)
        mark_cleared(run, generation)


def _delete_run(run: Run, generation: int, plan: Plan | None) -> None:
    """Delete the files of an overwritten run: those that are staged before those that were published from them."""
    if plan is None:  # damaged, or an older version's; what it has in results/ is deleted at the end
        names = [name for name, _ in run.storage.walk(run.path(COMMITS))] if run.has(COMMITS, "folder") else []
        commits = [name for name in names if re.fullmatch(numbered(r"\d{8}", generation), name)]
    else:
        commits = plan.commit_names()
    stored = [_stored(data) for data in run.storage.read_all([run.path(COMMITS, name) for name in commits])]
    found = [commit for commit in stored if commit is not None]
    run.storage.delete_files(run.path(commit.staged, file) for commit in found for file in commit.files)
    run.storage.delete_files(run.path(file) for commit in found for file in commit.files)
    run.storage.delete_files(run.path(COMMITS, name) for name in commits)
    if plan is not None:
        for listing in plan.listings:
            run.storage.delete_folder(run.path(MANIFEST, listing.name))
        if plan.memory is not None:
            run.storage.delete_file(run.path(plan.memory))


def _sum(parts: Sequence[Written]) -> Written:
    return Written(
        shard=parts[0].shard,
        scored=sum(part.scored for part in parts),
        anomalies=sum(part.anomalies for part in parts),
        errors=sum(part.errors for part in parts),
        staged=parts[0].staged,
        files=tuple(file for part in parts for file in part.files),
        sizes=tuple(size for part in parts for size in part.sizes),
        doubtful=sum(part.doubtful for part in parts),
        pages=sum(part.pages for part in parts),
        shard_pages=parts[0].shard_pages,
        unjudged=sum(part.unjudged for part in parts),
    )
