"""A simulated storage and the processes that use it, interleaved and disturbed as a seed decides.

A process is a greenlet that runs the project's own code. Every call of storage gives control to the world, which lets
another process run, delays it, executes it, or does one of the things that machines and networks do. Nothing else is
random, so a seed gives the same history every time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

from cluster.storage import StorageError

MOST_STEPS = 20_000
LOST = "the simulated network lost the answer"


class Endless(Exception):
    """The processes of a world go round in a circle."""


@dataclass
class Faults:
    """How often, per call of storage, and for how long."""

    kill: float = 0.0
    fail: float = 0.0  # the call is not executed, and the caller is told so
    ambiguous: float = 0.0  # it is executed, and the caller is told that it failed
    late: float = 0.0  # the caller is told that it failed, and it is executed later
    twice: float = 0.0  # the first answer is lost, so the client asks again by itself
    pause: float = 0.0  # the caller stops before or after the call
    longest_pause: int = 1000
    lag: int = 0  # a listing may show a file as it was so many steps ago


class Process:
    """Something that runs: a driver, a writer, a reader."""

    def __init__(self, world: World, name: str, body: Callable[[], Any]) -> None:
        self.name, self.world = name, world
        self.ready_at = 0
        self.waits_for: Callable[[], bool] | None = None
        self.call: Call | None = None
        self.dead = self.ended = False
        self.value: Any = None
        self.error: Exception | None = None
        self.greenlet = greenlet(lambda _: self._run(body), world.hub)

    def _run(self, body: Callable[[], Any]) -> None:
        try:
            self.value = body()
        except Exception as error:
            self.error = error
        self.ended = True

    @property
    def alive(self) -> bool:
        return not (self.dead or self.ended)


@dataclass
class Call:
    """A call of storage that is under way."""

    name: str
    path: str
    effect: Callable[[], Any]
    tries: int = 0


def touchy(call: Call) -> int:
    """How much more often a caller pauses at this call, since what it does was decided before."""
    if call.name == "delete" and call.path.endswith("/run.json"):
        return 16
    return 4 if call.name in ("link", "delete", "list") else 1


@dataclass
class World:
    """Files, processes and time, which counts calls."""

    seed: int
    faults: Faults = field(default_factory=Faults)
    replaces: bool = False  # as S3 does: a link replaces its target
    traced: bool = False

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.hub = getcurrent()
        self.time = self.steps = 0
        self.files: dict[str, bytes] = {}
        self.before: dict[str, tuple[int, bytes | None]] = {}  # when a file last changed, and what it was before
        self.processes: list[Process] = []
        self.running: dict[Any, Process] = {}
        self.late: list[tuple[int, Call]] = []
        self.watch: Callable[[Call], None] = lambda call: None
        self.trace: list[str] = []

    def start(self, name: str, body: Callable[[], Any]) -> Process:
        process = Process(self, name, body)
        self.processes.append(process)
        self.running[process.greenlet] = process
        return process

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Let processes run, in an order that the seed decides, until the condition holds or none can go on.

        Raises:
            Endless: after `MOST_STEPS` in all.
        """
        while not until():
            self.steps += 1
            if self.steps > MOST_STEPS:
                raise Endless(f"it has not ended after {MOST_STEPS} steps")
            able = [
                process
                for process in self.processes
                if process.alive
                and process.ready_at <= self.time
                and (process.waits_for is None or process.waits_for())
            ]
            if self.late and (not able or self.late[0][0] <= self.time):
                _, call = self.late.pop(0)
                self._execute(call, "late")
            elif able:
                self._step(self.rng.choice(able))
            else:
                paused = [process.ready_at for process in self.processes if process.alive and not process.waits_for]
                if not [moment for moment in paused if moment > self.time]:
                    return
                self.time = min(moment for moment in paused if moment > self.time)
            self.time += 1

    def _step(self, process: Process) -> None:
        process.waits_for = None
        call = process.call
        if call is None:
            self._resume(process, None)
            return
        fate = self._fate(call)
        if fate == "pause":
            process.ready_at = self.time + self.rng.randint(1, self.faults.longest_pause)
            self.note(process.name, call, "pauses before")
            if self.rng.random() < 0.5:
                return
            value, error = self._execute(call, process.name)
            call.effect, call.tries = lambda: self._raise(error) if error else value, 1
        elif fate == "kill":
            if self.rng.random() < 0.5:
                self._execute(call, process.name)
            self.note(process.name, call, "is killed")
            process.dead = True
        elif fate in ("fail", "ambiguous", "late"):
            if fate == "ambiguous":
                self._execute(call, process.name)
            if fate == "late":
                self.late.append((self.time + self.rng.randint(1, self.faults.longest_pause), call))
                self.late.sort(key=lambda item: item[0])
            self.note(process.name, call, fate)
            self._resume(process, StorageError(LOST))
        elif fate == "twice" and not call.tries:
            call.tries = 1
            self._execute(call, process.name)
            self.note(process.name, call, "is asked again")
        else:
            value, error = self._execute(call, process.name)
            self._resume(process, error or value)

    def _fate(self, call: Call) -> str:
        draw, faults = self.rng.random(), self.faults
        if call.tries:
            return "ok"
        for name in ("kill", "fail", "ambiguous", "late", "twice", "pause"):
            draw -= getattr(faults, name) * (touchy(call) if name == "pause" else 1)
            if draw < 0:
                return name
        return "ok"

    def _execute(self, call: Call, by: str) -> tuple[Any, Exception | None]:
        try:
            value, error = call.effect(), None
        except (OSError, StorageError) as raised:
            value, error = None, raised
        self.note(by, call, f"-> {error or value!r}")
        self.watch(call)
        return value, error

    @staticmethod
    def _raise(error: Exception) -> None:
        raise error

    def _resume(self, process: Process, result: Any) -> None:
        process.call = None
        if isinstance(result, Exception):
            process.greenlet.throw(result)
        else:
            process.greenlet.switch(result)

    def note(self, by: str, call: Call, what: str) -> None:
        if self.traced:
            self.trace.append(f"{self.time:6} {by:12} {call.name} {call.path} {what[:200]}")

    def ask(self, name: str, path: str, effect: Callable[[], Any]) -> Any:
        """A call of storage by the process that runs now; outside of any process it is executed at once."""
        current = getcurrent()
        if current is self.hub:
            lag, self.faults.lag = self.faults.lag, 0
            value = effect()
            self.faults.lag = lag
            return value
        process = self.running[current]
        if process.dead:  # it is being collected
            raise GreenletExit
        process.call = Call(name, path, effect)
        return self.hub.switch()

    def wait(self, condition: Callable[[], bool]) -> None:
        """Let the process that runs now wait for something that another one does."""
        self.running[getcurrent()].waits_for = condition
        self.hub.switch()

    def put(self, path: str, data: bytes | None) -> None:
        self.before[path] = (self.time, self.files.get(path))
        if data is None:
            self.files.pop(path, None)
        else:
            self.files[path] = data

    def listed(self) -> dict[str, bytes]:
        """The files as a listing shows them."""
        if not self.faults.lag:
            return dict(self.files)
        shown = dict(self.files)
        for path, (changed, before) in self.before.items():
            if changed > self.time - self.faults.lag and self.rng.random() < 0.5:
                if before is None:
                    shown.pop(path, None)
                else:
                    shown[path] = before
        return dict(sorted(shown.items()))


class SimulatedStorage:
    """What runs use of `cluster.storage.Storage`, one scheduling point for every request."""

    endpoint = None

    def __init__(self, world: World) -> None:
        self.world = world

    def kind(self, uri: str) -> str:
        def effect() -> str:
            if uri in self.world.files:
                return "file"
            return "folder" if any(path.startswith(f"{uri}/") for path in self.world.files) else "none"

        return self.world.ask("kind", uri, effect)

    def read_all(self, uris: Sequence[str]) -> list[bytes | None]:
        return [self.world.ask("read", uri, lambda uri=uri: self.world.files.get(uri)) for uri in uris]

    def holds(self, uri: str, size: int) -> bool:
        return self.world.ask(
            "size", uri, lambda: len(self.world.files.get(uri, "")) == size and uri in self.world.files
        )

    def write(self, uri: str, data: bytes) -> None:
        self.world.ask("write", uri, lambda: self.world.put(uri, data))

    def create(self, uri: str, data: bytes) -> bool:
        def effect() -> bool:
            if uri in self.world.files:
                return False
            self.world.put(uri, data)
            return True

        return self.world.ask("create", uri, effect)

    def link(self, source: str, target: str) -> bool:
        def effect() -> bool:
            data = self.world.files.get(source)
            if data is not None and (self.world.replaces or target not in self.world.files):
                self.world.put(target, data)
            return data is not None

        return self.world.ask("link", target, effect)

    def delete_file(self, uri: str, only: bytes | None = None) -> None:
        def effect() -> None:
            if uri in self.world.files and only in (None, self.world.files[uri]):
                self.world.put(uri, None)

        self.world.ask("delete", uri, effect)

    def delete_files(self, uris: Iterable[str]) -> None:
        for uri in uris:
            self.delete_file(uri)

    def delete_folder(self, uri: str) -> None:
        listed = self.world.ask(
            "list", uri, lambda: [path for path in self.world.listed() if path.startswith(f"{uri}/")]
        )
        self.delete_files(listed)

    def walk(self, uri: str) -> Iterator[tuple[str, int]]:
        def effect() -> list[tuple[str, int]]:
            listed = self.world.listed().items()
            return [(path[len(uri) + 1 :], len(data)) for path, data in listed if path.startswith(f"{uri}/")]

        yield from self.world.ask("list", uri, effect)

    def folders(self, uri: str) -> list[str]:
        return sorted({path.split("/")[0] for path, _ in self.walk(uri) if "/" in path})
