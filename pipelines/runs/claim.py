"""Who may write a run folder: plan.json, created exclusively, claims it.

    plan.json, plan.2.json, ...    one for each *generation* of the folder; the highest number is in force

A job lists the archive into files of its own and then claims the folder by creating the plan of the next generation,
which no two jobs can. A second job of the same command finds that plan and works on with it. `--overwrite` begins a run
in a new generation. A job that finds committed results missing begins one too: the same run, in which the damaged
shards are scored again. So does `--new`, once the run is complete: the same run with a further listing, of the images
that came since. Of two such jobs one creates the plan; the other works on with it, and its own listing counts for
nothing.

A process cannot know that it has been replaced: it may have stopped for hours. So whatever readers see is put in its
place by a fenced step: (1) the file is written elsewhere, under a name of its own; (2) its name is committed; (3) the
plan is found to be in force still; (4) the file is linked to its place, which fails if it is not there any more. A job
that begins a generation first creates its plan, then deletes the files that commits of older ones name, first those of
(1), then those of (4). Either (3) finds the new plan, or the commit of (2) came before it, so that its files are found
and deleted. No step looks at a clock, and none needs a listing to be up to date.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_right
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError

from cluster.storage import StorageError
from glad_core.errors import GladError
from pipelines.runs.run import Run
from pipelines.runs.schema import COMMITS, COMPLETE, ERRORS, MANIFEST, PLAN, RESULTS

SHARDS = 50  # that an archive is cut into, as long as a shard gets no larger than it may
LEAST_ROWS, MOST_ROWS = 8, 512  # images of a shard
CLEARED = b"{}\n"  # what is left of the plan of a run that has been overwritten and deleted


@dataclass(frozen=True)
class Listing:
    """A listing of the archive in ``manifest/NAME``: of all images, or of those that came since the ones before it.

    Attributes:
        listed: number of images that each listing task found, in the manifest's order.
        rows_per_shard: as in `Plan`.
        at: seconds since 1970 when it was begun; 0: unknown, an older version made it.
    """

    name: str
    listed: tuple[int, ...]
    rows_per_shard: int
    at: int = 0

    @property
    def images(self) -> int:
        return sum(self.listed)

    @property
    def shards(self) -> int:
        return -(-self.images // self.rows_per_shard)


@dataclass(frozen=True)
class Plan:
    """What a run is, and how the ``images`` of its listings are cut into shards.

    Attributes:
        duplicates: entries that named an image a second time; ``blank`` ones of a list named nothing. This and
            ``left_out`` are those of the latest listing, which went through the whole archive as well.
        left_out: number of other files and entries that are not in the manifest, by reason.
        rows_per_shard: a power of two that divides the rows of a manifest file.
        listed, listing, listed_at: of the first `Listing`.
        added: the later ones.
        memory: name of the file of good patches, of a run with --method nearest.
        identity: everything that decides the results; plain JSON values.
        run: the run's id, which a resumed run keeps.
        generation: of the folder; ``base`` is the one in which this run began.
        repairs: (shard, generation) of every shard that had to be scored again.
    """

    images: int
    duplicates: int
    blank: int
    rows_per_shard: int
    listed: tuple[int, ...]
    listing: str
    memory: str | None
    identity: dict[str, Any]
    run: str
    generation: int = 0
    base: int = 0
    repairs: tuple[tuple[int, int], ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)
    listed_at: int = 0
    added: tuple[Listing, ...] = ()

    @cached_property
    def listings(self) -> tuple[Listing, ...]:
        """Every listing, the first one first."""
        return (Listing(self.listing, self.listed, self.rows_per_shard, self.listed_at), *self.added)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(listing.shards for listing in self.listings))

    @property
    def shards(self) -> int:
        return self._ends[-1]

    def place_of(self, shard: int) -> tuple[Listing, int]:
        """The listing that a shard is of, and its first image there. No shard is of two listings."""
        number = bisect_right(self._ends, shard)
        listing = self.listings[number]
        return listing, (shard - (self._ends[number] - listing.shards)) * listing.rows_per_shard

    def rows_of(self, shard: int) -> int:
        """Number of images in a shard; the last one of a listing may have fewer."""
        listing, first = self.place_of(shard)
        return min(listing.rows_per_shard, listing.images - first)

    def missing(self, done: Container[int]) -> list[int]:
        """The shards that are not ``done``, in order."""
        return [shard for shard in range(self.shards) if shard not in done]

    def commit_names(self) -> list[str]:
        """Name of every shard's commit, in order. Each is created once, in the generation that first scores it."""
        repaired = dict(self.repairs)
        return [numbered(f"{shard:08d}", repaired.get(shard, self.base)) for shard in range(self.shards)]

    def grown(self, listed: Sequence[int], name: str, most_rows: int, shards: int = SHARDS) -> Plan:
        """The plan with a further listing, to be put in force by `claim`; arguments as of `draft`."""
        listing = Listing(name, tuple(listed), _rows(sum(listed), most_rows, shards), int(time.time()))
        return replace(self, images=self.images + listing.images, added=(*self.added, listing))


_PLAN = TypeAdapter(Plan)


class Found(NamedTuple):
    """The highest generation in a folder, 0 if there is none, and its plan.

    The plan is None if it is damaged or an older version's, or if the caller is to claim the next generation.
    """

    generation: int
    plan: Plan | None


def draft(
    listed: Sequence[int],
    listing: str,
    memory: str | None,
    identity: dict[str, Any],
    most_rows: int,
    duplicates: int = 0,
    blank: int = 0,
    shards: int = SHARDS,
    left_out: dict[str, int] | None = None,
) -> Plan:
    """Cut a listed archive into shards: small ones to show progress in a small archive, files worth opening in a large.

    Args:
        most_rows: of a shard; a power of two that divides the rows of a manifest file.
        shards: that it should be cut into, as long as they are of 8 to ``most_rows`` images.
    """
    return Plan(
        sum(listed),
        duplicates,
        blank,
        _rows(sum(listed), most_rows, shards),
        tuple(listed),
        listing,
        memory,
        identity,
        uuid4().hex[:12],
        left_out=left_out or {},
        listed_at=int(time.time()),
    )


def _rows(images: int, most_rows: int, shards: int) -> int:
    wished = max(LEAST_ROWS, images // shards)
    return min(most_rows, 1 << (wished.bit_length() - 1))


def find(run: Run) -> Found:
    """The plan in force; None for one that is damaged or that an older version wrote.

    A run that grows every hour has thousands of generations. Their numbers have no gaps, so few of them are read.

    Raises:
        StorageError: storage cannot be used.
    """
    generation, newest, step = 0, b"", 1
    while step:
        data = run.storage.read_all([_plan_file(run, generation + step)])[0]
        if data is not None:
            generation, newest, step = generation + step, data, 2 * step
        else:
            step //= 2
    return Found(generation, _parsed(newest))


def find_own(run: Run, identity: dict[str, Any], overwrite: bool) -> Found:
    """What a job finds in its folder: the run that it resumes, or none, so that it may claim the next generation.

    Raises:
        GladError: the folder holds another run, and ``overwrite`` is not given; a plan has been deleted.
        StorageError: storage cannot be used.
    """
    if run.storage.kind(run.location) == "file":
        raise StorageError(f"{run.location}: a file is in the way; choose another folder")
    found = find(run)
    if not found.generation and run.has(COMMITS, "folder"):
        raise GladError(
            f"{_plan_file(run, 1)} has been deleted, but not the rest of that run: delete {run.location} too"
        )
    if overwrite:
        return Found(found.generation, None)
    if found.generation:
        if found.plan is None:
            raise GladError(
                f"{_plan_file(run, found.generation)}: damaged, or written by an older version; "
                "give --overwrite to begin anew"
            )
        difference = _difference(found.plan.identity, identity)
    else:
        taken = [COMPLETE] if run.has(COMPLETE) else []
        taken += [name for name in (RESULTS, ERRORS) if run.has(name, "folder")]
        difference = f"not started by `glad score`: {taken[0]}" if taken else None
    if difference is not None:
        raise GladError(
            f"{run.location} already holds another run ({difference}): choose another --out or give --overwrite"
        )
    return found


def claim(run: Run, generation: int, prepare: Callable[[str], Plan], base: int | None = None) -> Plan:
    """Have an archive listed and put its plan in force as this ``generation``, the next.

    If a job of the same command was first, its plan holds.

    Args:
        base: generation in which the run began, if it grows by this plan.
        prepare: lists the archive into ``manifest/LISTING``, writes the file `memory_file` if the job needs one, and
            returns the `draft`. Its argument is LISTING, a name that no other job uses.

    Raises:
        GladError: another command was first.
        StorageError: the folder cannot be written.
    """
    listing = uuid4().hex[:12]
    try:
        prepared = prepare(listing)
    except BaseException:
        with suppress(StorageError):  # what went wrong first is what the user is to hear
            _discard(run, listing)
        raise
    try:
        plan = _put_in_force(run, replace(prepared, generation=generation, base=base or generation))
    except GladError:  # not after a StorageError: the server may have put this plan in force nevertheless
        _discard(run, listing)
        raise
    if listing not in [one.name for one in plan.listings]:
        _discard(run, listing)
    return plan


def _discard(run: Run, listing: str) -> None:
    run.storage.delete_folder(run.path(MANIFEST, listing))
    run.storage.delete_file(run.path(memory_file(listing)))


def memory_file(listing: str) -> str:
    """Name of the file of good patches of a run with --method nearest."""
    return f"memory-{listing}.safetensors"


def repair(run: Run, plan: Plan, shards: Iterable[int]) -> Plan:
    """Put a plan of the same run in force in which these shards count as not scored; raises as `claim`."""
    generation = plan.generation + 1
    repairs = (*plan.repairs, *((shard, generation) for shard in shards))
    return _put_in_force(run, replace(plan, generation=generation, repairs=repairs))


def check_in_force(run: Run, plan: Plan) -> None:
    """Raise a GladError if a later generation has begun."""
    if run.storage.read_all([_plan_file(run, plan.generation + 1)])[0] is not None:
        raise GladError(
            f"{run.location}: another command has begun anew in this folder, so this one stops; "
            "see how far it is by `glad status`"
        )


def older_plans(run: Run, plan: Plan) -> list[tuple[int, Plan | None]]:
    """The generations before this run that have not been cleared, and their plans; None for a damaged one."""
    generations = range(1, plan.base)
    plans = run.storage.read_all([_plan_file(run, generation) for generation in generations])
    return [(number, _parsed(data or b"")) for number, data in zip(generations, plans, strict=True) if data != CLEARED]


def mark_cleared(run: Run, generation: int) -> None:
    """Record that nothing of a generation is left. Its plan's file stays, so that its number is not used again."""
    run.storage.write(_plan_file(run, generation), CLEARED)


def numbered(name: str, generation: int) -> str:
    """The name of a generation's file: NAME.json for the first, NAME.2.json for the second."""
    return f"{name}.json" if generation == 1 else f"{name}.{generation}.json"


def _plan_file(run: Run, generation: int) -> str:
    return run.path(numbered(PLAN, generation))


def _put_in_force(run: Run, plan: Plan) -> Plan:
    file = _plan_file(run, plan.generation)
    try:
        created = run.storage.create(file, (json.dumps(asdict(plan)) + "\n").encode())
    except StorageError as error:
        raise StorageError(f"{run.location} cannot be written; choose another --out ({error})") from error
    if created:
        return plan
    # Or ours, if the server created it and then reported a failure.
    theirs = _parsed(run.storage.read_all([file])[0] or b"")
    if theirs is None or _difference(theirs.identity, plan.identity) is not None:
        raise GladError(f"{run.location}: another run has just started writing there; choose another --out")
    return theirs


def _parsed(data: bytes) -> Plan | None:
    try:
        return _PLAN.validate_json(data)
    except ValidationError:
        return None


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """How an identity differs from that of the run in the folder, None if it does not."""
    for name in [*now, *before]:
        if now.get(name) != before.get(name):
            return f"{name} was {_short(before.get(name))}, now {_short(now.get(name))}"
    return None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
