"""One Ray session for a job: on this machine, or on a running cluster."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cluster.local_ray import LocalRay
from cluster.nodes import NotShared, check_nodes

if TYPE_CHECKING:
    from ray.autoscaler.v2.schema import ClusterStatus

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # the job draws its own
    "RAY_DATA_USE_OBSTORE": "0",  # with a custom endpoint its downloads silently return null
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that outlives the session would start another Ray
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # tasks without GPUs keep CUDA_VISIBLE_DEVICES
}
START_SECONDS = (90.0, 300.0)  # for Ray to start on this machine, at the first attempt and at the second
JOIN_SECONDS = 120.0  # for a running Ray to take this process in
LEAVE_SECONDS = 3.0  # for it to let this process go
TROUBLES = {  # words of Ray's message: what the user is told
    "low on memory": "memory is short: Ray ended a process of the job and starts another; fewer --actors need less",
    "A worker died": "a process of the job died; Ray starts another",
}
ANSWER_SECONDS = 10  # for a cluster's port to answer
# A resource that the head of a growing cluster declares: how many GPUs the autoscaler may start. Ray itself does not
# report this while no GPU machine is up.
GPUS_TO_COME = "gpus_to_come"

_local_ray: LocalRay | None = None  # that `connect` started
_died = False  # it did


class SessionError(Exception):
    """Ray could not be started or reached. The message is one line with the way out."""


def connect(address: str | None = None, reads: Sequence[str] = (), writes: Sequence[str] = ()) -> None:
    """Start Ray on this machine, or join the cluster at ``address`` (``host:port`` or ``auto``); says so on stderr.

    An existing session of this process is used as it is. Ray itself handles the authentication token
    (``RAY_AUTH_MODE``, ``RAY_AUTH_TOKEN_PATH``). What of a cluster differs from this machine is said (`check_nodes`).

    Args:
        reads, writes: absolute locations that tasks on all machines read and write.

    Raises:
        SessionError: nothing answers at ``address``, Ray cannot be started, or other machines of the cluster do not
            have one of the locations.
    """
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    ray: Any = sys.modules.get("ray")  # to import it takes seconds, and the user shall know before
    if ray is None or not ray.is_initialized():
        try:
            _check_port(address)
            _join(_start() if address is None else address, address)
        except Exception as error:  # Ray raises plain ones
            if isinstance(error, SessionError):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            reason = _other_versions(str(error)) or f"{reason}; check --address and the authentication token"
            ray_at = f"the Ray cluster at {address}" if address else "Ray on this machine"
            raise SessionError(f"cannot use {ray_at}: {reason}") from error
        if address is not None:
            try:
                check_nodes(reads, writes)
            except NotShared as error:
                raise SessionError(str(error)) from error
    configure_ray_data()


def _other_versions(message: str) -> str | None:
    """Ray's paragraph about its own version and Python's as a few words; None if ``message`` is another one."""
    found = re.findall(r"Ray: (\S+)\s+Python: (\S+)", message)
    if len(found) != 2:
        return None
    (ray, python), (own_ray, own_python) = found
    return (
        f"it has Ray {ray} and Python {python}, this machine Ray {own_ray} and Python {own_python}: install the same "
        "here, or send the command with `glad submit`"
    )


def _start() -> str:
    """Start Ray on this machine, at most twice; returns its address.

    Raises:
        SessionError: neither start was ready in time.
    """
    global _local_ray
    print("starting Ray", file=sys.stderr, flush=True)
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # as `ray.init` does for the Ray that it starts
    for seconds in START_SECONDS:
        _local_ray = LocalRay()
        answer = _local_ray.answer(seconds)
        if "address" in answer:
            threading.Thread(target=_end_with, args=(_local_ray,), daemon=True, name="glad-ray").start()
            return answer["address"]
        _local_ray.end()
        if seconds != START_SECONDS[-1]:
            print(f"Ray did not start: {answer['error']}; trying once more", file=sys.stderr, flush=True)
    raise SessionError(
        f"Ray did not start on this machine, twice: {answer['error']}; give the same command again when the machine "
        "is less busy (glad doctor shows its memory and disk)"
    )


def _join(ray_address: str, address: str | None) -> None:
    """Make this process a driver. In a thread, since Ray may wait for ever and deaf to signals.

    Raises:
        TimeoutError: Ray is silent for `JOIN_SECONDS`.
        Exception: whatever Ray raises.
    """
    if address is not None:
        print(f"joining the Ray cluster at {address}", file=sys.stderr, flush=True)
    # What Ray's C++ code logs in this process is for Ray's developers, such as the news that Ray Data puts the
    # arguments of its actors into the object store. The logs of Ray's other processes are files.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray  # here, not in the thread: it takes as long as the machine is busy

    logging.getLogger("ray").setLevel(logging.ERROR)
    outcome: Future[None] = Future()

    def join() -> None:
        try:
            ray._raylet.Config.initialize("")  # type: ignore[attr-defined]  # reads RAY_AUTH_MODE again
            ray._private.worker.print_to_stdstream = _print_trouble  # type: ignore[assignment]
            ray.init(address=ray_address, logging_level=logging.ERROR, log_to_driver=False)
        except BaseException as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    thread = threading.Thread(target=join, daemon=True, name="glad-join")
    with _no_stderr(thread):
        thread.start()
        try:
            outcome.result(JOIN_SECONDS)
        except TimeoutError as error:
            raise TimeoutError(f"no answer within {JOIN_SECONDS:g} seconds") from error
        finally:
            _restore_handlers()


def _print_trouble(message: dict[str, Any], ignore_prefix: bool) -> None:
    """What Ray reports of its processes, in place of its own paragraphs on stdout: a line on stderr, once per kind."""
    for words in [words for words in TROUBLES if any(words in line for line in message["lines"])]:
        print(TROUBLES.pop(words), file=sys.stderr, flush=True)


def _restore_handlers() -> None:
    """Undo Ray's signal handlers, which print where in its C++ code a signal came: Python's own do not know of them."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.getsignal(number))


@contextmanager
def _no_stderr(thread: threading.Thread) -> Iterator[None]:
    """File 2 leads nowhere while ``thread`` starts Ray, which prints that its log level was set, at whatever level.

    If the thread is given up, so is file 2: Ray prints stacks when its processes end under it.
    """
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.close(nothing)
        if thread.is_alive():
            sys.stderr = os.fdopen(kept, "w")
        else:
            os.dup2(kept, 2)
            os.close(kept)


def _end_with(ray: LocalRay) -> None:
    """End the command if its Ray dies: what waits for an answer would wait for ever."""
    global _died
    ray.wait_for_death()
    if _local_ray is ray:
        _died = True
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def died() -> bool:
    """Whether the Ray that `connect` started has died, for which this process got a SIGTERM."""
    return _died


def disconnect() -> None:
    """Leave Ray, and end the one that `connect` started: within seconds, whatever state it is in."""
    global _local_ray
    ray: Any = sys.modules.get("ray")
    if ray is not None and ray.is_initialized() and not _died:
        leaving = threading.Thread(target=ray.shutdown, daemon=True, name="glad-leave")
        leaving.start()
        leaving.join(LEAVE_SECONDS)
    local_ray, _local_ray = _local_ray, None
    if local_ray is not None:
        local_ray.end()


def warm_up_ray_data() -> None:
    """Start the actors that Ray Data keeps for a session, so that the first dataset need not wait for them."""
    import ray.data

    list(ray.data.from_items([0]).iter_rows())


def _check_port(address: str | None) -> None:
    """Raise OSError if nothing listens at ``host:port``: Ray itself would try for more than ten minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit() and "://" not in host:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()


def resources() -> dict[str, float]:
    """CPU, GPU and memory (bytes) of the whole cluster, e.g. ``{"CPU": 2.0, "memory": 8e9}``."""
    import ray

    return dict(ray.cluster_resources())


def gpus(available: dict[str, float]) -> float:
    """Number of GPUs in these `resources`, or that the autoscaler may start."""
    return max(available.get("GPU", 0.0), available.get(GPUS_TO_COME, 0.0))


def waiting_for(num_cpus: float, num_gpus: float) -> str | None:
    """One line about what actors of this size wait for, or work that no machine is large enough for.

    None if nothing waits, or Ray does not answer.
    """
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    except Exception:  # a missing line in the log is no reason to fail
        return None
    actor = {name: amount for name, amount in (("CPU", num_cpus), ("GPU", num_gpus)) if amount}
    requests = [
        request for demand in status.resource_demands.ray_task_actor_demand for request in demand.bundles_by_count
    ]
    waiting = [request for request in requests if request.bundle == actor]
    waiting += [request for request in requests if not _large_enough(nodes, request.bundle)]
    if not waiting:
        return None
    bundle, count = waiting[0].bundle, waiting[0].count
    work = "a task" if bundle != actor else "an actor" if count == 1 else f"{count} actors"
    size = " and ".join(f"{amount:g} {name}" for name, amount in sorted(bundle.items()))
    return f"waiting for room for {work} with {size}: {room(nodes, bundle)}; {machines_to_come(status)}"


def _large_enough(nodes: list[dict[str, float]], bundle: dict[str, float]) -> int:
    return sum(all(node.get(name, 0) >= amount for name, amount in bundle.items()) for node in nodes)


def room(nodes: list[dict[str, float]], bundle: dict[str, float]) -> str:
    """How many machines could hold work that waits, in words.

    Args:
        nodes: resources of every machine, whether in use or not.
        bundle: resources that the work needs.
    """
    fitting = _large_enough(nodes, bundle)
    if not fitting:
        return f"none of {len(nodes)} machines is large enough"
    return f"{fitting} of {len(nodes)} machines {'is' if fitting == 1 else 'are'} large enough, but in use"


def machines_to_come(status: ClusterStatus) -> str:
    """What the autoscaler does about work that waits, in words."""
    coming = sum(launch.count for launch in status.pending_launches) + len(status.pending_nodes)
    if coming:
        return f"{coming} more {'is' if coming == 1 else 'are'} being started"
    failures = [launch.details for launch in status.failed_launches if launch.details]
    if failures:
        return f"the last start failed: {' '.join(failures[-1].split())[:300]}"
    return "none is being started: add one, or ask for less"


def node_cpus() -> list[float]:
    """CPUs of every living node; one task or worker can have at most those of one node."""
    import ray

    return [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]


def gpu_nodes() -> list[tuple[float, float]]:
    """CPUs and GPUs of every living node that has GPUs."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(node.get("CPU", 0.0), node["GPU"]) for node in nodes if node.get("GPU")]


def store_bytes() -> float:
    """The smallest object store of a living node, bytes."""
    import ray

    return min(
        (node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0
    )


def root_cause(error: BaseException, *kinds: type[Exception]) -> BaseException:
    """The exception of one of ``kinds`` inside Ray's wrappers, for its one line; else ``error`` itself."""
    layer: BaseException | None = error
    while layer is not None:
        # Ray's wrapper of a task's error is also an instance of that error's class, so unwrap before the check.
        inner = getattr(layer, "cause", None) or layer.__cause__
        if isinstance(layer, kinds) and not hasattr(layer, "cause"):
            return type(layer)(str(layer).partition("\n")[0])  # Ray Data adds lines about its own settings
        layer = inner
    return error


def configure_ray_data() -> None:
    """Set up Ray Data for this process; a worker that streams data itself calls this too."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # GPU machines may take hours to start; Ray Data would end the job after half an hour without a block.
    context.execution_no_progress_timeout_s = -1
    # Otherwise our own exceptions arrive as text inside one of Ray's.
    context.raise_original_map_exception = True
    # The listing task of version 2 needs a whole CPU and takes no options: on a machine whose CPUs the actors share,
    # it never starts and the job hangs.
    context.use_datasource_v2 = False
    for limit in ("The minimum number of concurrent actors", "The maximum number of concurrent tasks"):
        warnings.filterwarnings("ignore", message=limit)  # of archives smaller than that
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # They print the traceback of an exception, 400 lines, that also reaches the caller.
    for name in ("ray.data.exceptions", "ray.data._internal.execution.streaming_executor_state"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
