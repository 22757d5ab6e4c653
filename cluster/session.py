"""One Ray session for a job: on this machine, or on a running cluster."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.autoscaler.v2.schema import ClusterStatus

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # the job draws its own
    "RAY_DATA_USE_OBSTORE": "0",  # with a custom endpoint its downloads silently return null
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # tasks without GPUs keep CUDA_VISIBLE_DEVICES
}
ANSWER_SECONDS = 10  # for a cluster's port to answer
# A resource that the head of a growing cluster declares: how many GPUs the autoscaler may start. Ray itself does not
# report this while no GPU machine is up.
GPUS_TO_COME = "gpus_to_come"


class SessionError(Exception):
    """Ray could not be started or reached. The message is one line with the way out."""


def connect(address: str | None = None) -> None:
    """Start Ray on this machine, or join the cluster at ``address`` (``host:port`` or ``auto``).

    An existing session of this process is used as it is. Ray itself handles the authentication token
    (``RAY_AUTH_MODE``, ``RAY_AUTH_TOKEN_PATH``).

    Raises:
        SessionError: nothing answers at ``address``.
    """
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    import ray

    if not ray.is_initialized():
        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            _check_port(address)
            ray.init(
                # Without an address Ray would join whatever cluster RAY_ADDRESS or an earlier `ray start` names.
                address=address or "local",
                include_dashboard=None if address else False,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            ray_at = f"the Ray cluster at {address}" if address else "Ray on this machine"
            raise SessionError(
                f"cannot use {ray_at}: {reason}; check --address and the authentication token"
            ) from error
    configure_ray_data()


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
