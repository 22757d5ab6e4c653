"""What happens in a simulated world, and what must hold in it at every moment.

Drivers do what `pipelines.score.job.score` does, with the project's own code for every step of the protocol; writers
stage files as `pipelines.runs.write.ResultsWriter` does. A driver is killed, paused, started again, doubled, or meets a
command that overwrites its run; archives grow, and drivers add what is new. At the end all who are still paused go on,
long after the run is complete.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from simulation.world import Call, Endless, Faults, Process, SimulatedStorage, World

from cluster.storage import StorageError
from glad_core.errors import GladError
from pipelines.runs import claim, commits, status, write
from pipelines.runs.claim import Plan
from pipelines.runs.run import Run
from pipelines.runs.schema import ERRORS, RESULTS

OUT = "/out"
WRITERS = 2  # of a driver
MOST_STARTS = 8  # of drivers, while there are faults
GROWTH = 12  # images that come at a time, at most
STEPS = 6000  # until the faults end


class Violation(AssertionError):
    """The protocol has broken its word.

    Attributes:
        kind: ``lost``, ``doubled`` or ``other``.
        trace: what had happened until then, if it was recorded.
    """

    def __init__(self, message: str, kind: str = "other", trace: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.kind, self.trace = kind, trace


class NothingNew(Exception):
    """An archive has not grown."""


class Id:
    """What uuid4 gives, from the seed."""

    def __init__(self, rng: random.Random) -> None:
        self.hex = f"{rng.getrandbits(128):032x}"


@contextmanager
def ids_from(rng: random.Random) -> Iterator[None]:
    """Let the project's code draw its ids from the seed."""
    before = [(module, module.uuid4) for module in (claim, write)]
    for module, _ in before:
        module.uuid4 = lambda: Id(rng)
    try:
        yield
    finally:
        for module, uuid4 in before:
            module.uuid4 = uuid4


class Scenario:
    """The life of one run folder."""

    def __init__(self, seed: int, traced: bool = False) -> None:
        self.world = World(seed, traced=traced)
        self.rng = self.world.rng
        self.world.replaces = self.rng.random() < 0.5
        self.run = Run(OUT, SimulatedStorage(self.world))
        self.images = {name: self.rng.randint(1, 24) for name in ("A", "B")}
        self.audited: tuple[bytes, dict[str, bytes]] | None = None
        self.damaged = False
        self.world.watch = self.audit

    # What processes do.

    def driver(self, name: str, overwrite: bool, new: bool = False) -> Plan:
        """A `glad score`; ``name`` stands for everything that decides the results."""
        run, identity = self.run, {"source": name}
        found = claim.find_own(run, identity, overwrite)
        plan = found.plan
        if plan is None or not commits.is_whole(run, plan):
            plan = plan or claim.claim(run, found.generation + 1, lambda listing: self.list(name, listing))
            plan = self.score(name, plan)
        if new:
            before = plan
            try:
                plan = claim.claim(
                    run, before.generation + 1, lambda listing: self.list_new(name, before, listing), before.base
                )
            except NothingNew:
                return before
            plan = self.score(name, plan)
        return plan

    def score(self, name: str, plan: Plan) -> Plan:
        """Score what is missing and close the run."""
        run = self.run
        plan, done = commits.recover(run, plan)
        try:
            for _, commit in commits.commit_shards(run, plan, self.pieces(plan, done)):
                if commit is not None:
                    done[commit.shard] = commit
        except (GladError, StorageError):
            if not commits.is_complete(run, plan):
                raise
        if not commits.is_complete(run, plan):
            if len(done) < plan.shards:
                raise GladError("shards are missing")
            counts = {key: sum(getattr(commit, key) for commit in done.values()) for key in ("scored", "errors")}
            record = {"counts": counts | {"images": plan.images}, "source": name, "ended": self.rng.random()}
            commits.complete(run, plan, done, record)
        return plan

    def list(self, name: str, listing: str) -> Plan:
        images = list(range(self.images[name]))
        self.write_listing(listing, images)
        return claim.draft([len(images)], listing, None, {"source": name}, most_rows=512)

    def list_new(self, name: str, plan: Plan, listing: str) -> Plan:
        known = {image for before in plan.listings for image in self.read_listing(before.name)}
        images = [image for image in range(self.images[name]) if image not in known]
        if not images:
            raise NothingNew
        self.write_listing(listing, images)
        return plan.grown([len(images)], listing, most_rows=512)

    def write_listing(self, listing: str, images: list[int]) -> None:
        self.run.storage.write(self.run.path("manifest", listing, "part-0.parquet"), json.dumps(images).encode())

    def read_listing(self, listing: str) -> list[int]:
        data = self.run.storage.read_all([self.run.path("manifest", listing, "part-0.parquet")])[0]
        if data is None:
            raise GladError("the manifest is missing")
        return json.loads(data)

    def pieces(self, plan: Plan, done: dict[int, Any]) -> Iterator[Any]:
        """Have every missing image scored: in pieces of shards, by writers that die and whose work is repeated."""
        staged = write.new_staging(plan.generation)
        todo: list[tuple[int, list[int]]] = []
        for shard in sorted(set(range(plan.shards)) - done.keys()):
            rows = list(range(plan.rows_of(shard)))
            cut = self.rng.randint(0, len(rows)) if self.rng.random() < 0.3 else 0
            todo += [(shard, part) for part in (rows[:cut], rows[cut:]) if part]
        queue: list[Any] = []
        started: list[tuple[Process, tuple[int, list[int]]]] = []
        delivered: set[tuple[int, int]] = set()

        def begin(work: tuple[int, list[int]]) -> None:
            def body() -> None:
                piece = self.write(plan, staged, *work)
                if (work[0], work[1][0]) not in delivered:  # Ray hands over one try of a call
                    delivered.add((work[0], work[1][0]))
                    queue.append(piece)

            started.append((self.world.start(f"writer{len(self.world.processes)}", body), work))

        expected = len(todo)
        for _ in range(expected):
            while not queue:
                busy = [
                    process for process, work in started if process.alive and (work[0], work[1][0]) not in delivered
                ]
                for work in list(todo)[: WRITERS - len(busy)]:
                    todo.remove(work)
                    begin(work)
                for process, work in list(started):
                    lost = process.dead or (process.ended and process.error is not None)
                    presumed = process.alive and self.rng.random() < 0.02
                    if (lost or presumed) and (work[0], work[1][0]) not in delivered:
                        if process.error is not None and self.rng.random() < 0.5:
                            raise process.error
                        started.remove((process, work))
                        begin(work)
                self.world.wait(lambda: bool(queue) or any(not process.alive for process, _ in started) or not started)
            yield queue.pop(0)

    def write(self, plan: Plan, staged: str, shard: int, rows: list[int]) -> Any:
        """A call of a writer: the rows of a piece, now and then as errors, to files of their own."""
        listing, first = plan.place_of(shard)
        listed = self.read_listing(listing.name)
        rows = [listed[first + row] for row in rows]
        failed = {row for row in rows if self.rng.random() < 0.1}
        tables = {RESULTS: [row for row in rows if row not in failed], ERRORS: sorted(failed)}
        files, sizes = [], []
        for name, table in tables.items():
            if table or shard == 0:
                files.append(f"{name}/{write.part_name(shard, plan.generation)}")
                data = json.dumps([plan.identity["source"], plan.run, table]).encode()
                sizes.append(len(data))
                self.run.storage.write(self.run.path(staged, files[-1]), data)
        scored = len(rows) - len(failed)
        return commits.Written(shard, scored, 0, len(failed), staged, tuple(files), tuple(sizes))

    def reader(self) -> None:
        """`glad status`, at any moment."""
        try:
            found = status.status(self.run)
        except GladError:
            return
        if found["images"] is not None and found["done"] > found["images"]:
            raise Violation(f"status says {found['done']} of {found['images']} images")

    # What must hold.

    def audit(self, call: Call) -> None:
        """After every call that may have changed something: what a reader would find."""
        if self.damaged or call.name in ("read", "size", "kind", "list"):
            return  # what has been damaged need be right only at the end
        self.check_commits()
        data = self.world.files.get(f"{OUT}/run.json")
        if data is None:
            if self.audited is not None and not self.newer_than(json.loads(self.audited[0])):
                raise Violation("run.json of a complete run has gone")
            self.audited = None
            return
        if self.audited is None or call.path.startswith((f"{OUT}/{RESULTS}", f"{OUT}/{ERRORS}", f"{OUT}/run.json")):
            self.check_complete(data)

    def check_complete(self, data: bytes) -> None:
        """The glob over a complete run holds every image once, it is what run.json says, and it never changes."""
        record = json.loads(data)
        found = {
            path: content
            for path, content in self.world.files.items()
            if path.startswith((f"{OUT}/{RESULTS}/", f"{OUT}/{ERRORS}/"))
        }
        rows = [(*json.loads(content)[:2], row) for content in found.values() for row in json.loads(content)[2]]
        stored = [self.world.files.get(f"{OUT}/manifest/{name}/part-0.parquet") for name in record["listings"]]
        if None in stored:
            raise Violation("a listing of a complete run has gone", "lost")
        listings = [json.loads(data or b"") for data in stored]
        images = sum(map(len, listings))
        if len({image for listing in listings for image in listing}) < images:
            raise Violation("an image is in two listings", "doubled")
        wanted = [(record["source"], record["run"], row) for row in range(images)]  # an archive grows at its end
        if sorted(rows) != wanted:
            kind = "doubled" if max(Counter(rows).values(), default=0) > 1 else "lost"
            raise Violation(f"a complete run holds {len(rows)} rows of {images} images", kind)
        scored = sum(len(json.loads(content)[2]) for path, content in found.items() if f"/{RESULTS}/" in path)
        if record["counts"] != {"scored": scored, "errors": images - scored, "images": images}:
            raise Violation(f"run.json says {record['counts']}, {scored} of {images} are results")
        if self.run.problem_of_files(record) is not None:
            raise Violation("run.json counts other files")
        if (
            self.audited is not None
            and self.audited != (data, found)
            and not self.newer_than(json.loads(self.audited[0]))
        ):
            raise Violation("a complete run has changed")
        self.audited = (data, found)

    def check_commits(self) -> None:
        """What is committed is there: no command deletes another's work, unless it was told to overwrite it."""
        plan = claim.find(self.run).plan
        if plan is None:
            return
        if plan.repairs:
            raise Violation("a repair, although nothing was damaged")
        for name in plan.commit_names():
            data = self.world.files.get(f"{OUT}/commits/{name}")
            if data is None:
                continue
            commit = json.loads(data)
            for file, size in zip(commit["files"], commit["sizes"], strict=True):
                places = (f"{OUT}/{file}", f"{OUT}/{commit['staged']}/{file}")
                if not any(len(self.world.files.get(place, b"")) == size for place in places):
                    raise Violation(f"{file} of a commit has gone", "lost")

    def newer_than(self, record: dict[str, Any]) -> bool:
        """Whether a later generation has begun than that which completed a run."""
        return f"{OUT}/{claim.numbered('plan', record['generation'] + 1)}" in self.world.files

    # What happens.

    def play(self) -> None:
        """The whole life. Raises Violation."""
        with ids_from(self.rng):
            self.set_faults()
            drivers: list[Process] = []
            overwriting, growing = self.rng.random() < 0.4, self.rng.random() < 0.5
            for number in range(self.rng.randint(1, MOST_STARTS)):
                if growing and self.rng.random() < 0.5:
                    self.images[self.rng.choice("AB")] += self.rng.randint(1, GROWTH)
                other = number > 0 and overwriting and self.rng.random() < 0.3
                new = growing and not other and self.rng.random() < 0.7
                name = self.rng.choice("AB") if overwriting else "A"
                drivers.append(self.begin(f"driver{number}", name, overwrite=other, new=new))
                if self.rng.random() < 0.2:
                    self.world.start(f"reader{number}", self.reader)
                patience = self.world.time + self.rng.randint(1, 400)
                self.world.run(lambda patience=patience: self.world.time > patience)
                self.end_orphans(drivers)
            self.world.run(lambda: self.world.time > STEPS)
            self.world.faults = Faults(lag=self.world.faults.lag)
            if self.rng.random() < 0.3:
                self.damage()
            paused = [process for process in self.world.processes if process.ready_at > self.world.time]
            self.finish(new=growing)
            for process in paused:  # zombies wake up
                process.ready_at = 0
            self.world.run()
            self.check_end(grown=growing)

    def set_faults(self) -> None:
        rng = self.rng
        self.world.faults = Faults(
            kill=rng.choice([0, 0.003, 0.02]),
            fail=rng.choice([0, 0, 0.005]),
            ambiguous=rng.choice([0, 0, 0.01]),
            late=rng.choice([0, 0, 0.01]),
            twice=rng.choice([0, 0.02]),
            pause=rng.choice([0, 0.01, 0.05]),
            longest_pause=rng.choice([30, 300, 100_000]),
            lag=rng.choice([0, 0, 20, 200]),
        )

    def begin(self, process: str, name: str, overwrite: bool, new: bool) -> Process:
        return self.world.start(process, lambda: self.driver(name, overwrite, new))

    def end_orphans(self, drivers: list[Process]) -> None:
        """Of a driver that died, some writers die too, and others work on."""
        if any(driver.dead for driver in drivers):
            for process in self.world.processes:
                if process.name.startswith("writer") and process.alive and self.rng.random() < 0.3:
                    process.dead = True

    def damage(self) -> None:
        """Somebody deletes or cuts files of ours. Nobody is at work then, or will be again."""
        for process in self.world.processes:
            process.dead = True
        self.world.late.clear()
        self.world.before.clear()
        self.damaged, self.audited = True, None
        for path in sorted(self.world.files):
            ours = path.startswith((f"{OUT}/{RESULTS}/", f"{OUT}/{ERRORS}/", f"{OUT}/commits/", f"{OUT}/record"))
            if (ours or path == f"{OUT}/run.json") and self.rng.random() < 0.3:
                data = self.world.files.pop(path)
                if self.rng.random() < 0.5:
                    self.world.files[path] = data[: len(data) // 2]

    def finish(self, new: bool) -> None:
        """Without faults, the command whose plan is in force completes the run, and adds what is ``new``."""
        for _ in range(5):
            plan = claim.find(self.run).plan
            name = plan.identity["source"] if plan is not None else "A"
            last = self.begin("last", name, overwrite=False, new=new)
            self.world.run(lambda last=last: not last.alive)
            if last.error is None:
                return
        raise Violation(f"the last command cannot finish: {last.error!r}") from last.error

    def check_end(self, grown: bool) -> None:
        data = self.world.files.get(f"{OUT}/run.json")
        if data is None:
            raise Violation("the run is not complete", "lost")
        self.check_complete(data)
        record = json.loads(data)
        if grown and record["counts"]["images"] != self.images[record["source"]]:
            raise Violation("what is new is not in the run", "lost")
        plan = claim.find(self.run).plan
        if plan is None or not commits.is_whole(self.run, plan):
            raise Violation("is_whole denies it")
        if not self.damaged and len(commits.read_commits(self.run, plan)) != plan.shards:
            raise Violation("not every shard is committed")
        if status.status(self.run)["state"] != "complete":
            raise Violation("status does not say complete")
        for process in self.world.processes:
            if process.error is not None and not isinstance(process.error, GladError | StorageError):
                raise Violation(f"{process.name}: {process.error!r}") from process.error


def simulate(seed: int, traced: bool = False) -> list[str]:
    """Play one seed; returns its trace if it is ``traced``. Raises Violation."""
    scenario = Scenario(seed, traced)
    try:
        scenario.play()
    except Violation as violation:
        raise Violation(f"seed {seed}: {violation}", violation.kind, scenario.world.trace) from violation
    except (Endless, ValueError) as error:  # ValueError: files that are no longer whole
        raise Violation(f"seed {seed}: {error!r}", trace=scenario.world.trace) from error
    return scenario.world.trace
