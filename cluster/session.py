"""One Ray session for a job: on this machine, or on a cluster that already runs."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from typing import Any

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # the job draws its own
    "RAY_DATA_USE_OBSTORE": "0",  # with an endpoint override its downloads silently return null
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
ANSWER_SECONDS = 10  # that a cluster's port has to answer


# A resource that the head of a growing cluster declares: how many GPUs the autoscaler may bring. Ray itself does not
# say while no GPU machine is up.
GPUS_TO_COME = "gpus_to_come"


class SessionError(Exception):
    """Ray could not be started or reached. The message is one line with the way out."""


def connect(address: str | None = None) -> None:
    """Start Ray on this machine, or join the cluster at ``address`` (``host:port`` or ``auto``).

    An existing session of this process is used as it is. Token authentication is Ray's own business
    (``RAY_AUTH_MODE``, ``RAY_AUTH_TOKEN_PATH``).

    Raises:
        SessionError: nothing answers at ``address``.
    """
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    import ray

    if not ray.is_initialized():
        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            _answers(address)
            ray.init(
                # Without an address Ray would join whatever cluster RAY_ADDRESS or an earlier `ray start` names.
                address=address or "local",
                include_dashboard=None if address else False,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            where = f"the Ray cluster at {address}" if address else "Ray on this machine"
            raise SessionError(f"cannot use {where}: {reason}; check --address and the authentication token") from error
    configure_ray_data()


def warm_up_ray_data() -> None:
    """Let the actors start that Ray Data keeps for a session, so that the first dataset need not wait for them."""
    import ray.data

    list(ray.data.from_items([0]).iter_rows())


def _answers(address: str | None) -> None:
    """Raise OSError if nothing listens at ``host:port``: Ray itself would go on trying for more than ten minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit() and "://" not in host:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()


def resources() -> dict[str, float]:
    """CPU, GPU and memory (bytes) of the whole cluster, e.g. ``{"CPU": 2.0, "memory": 8e9}``."""
    import ray

    return dict(ray.cluster_resources())


def gpus(available: dict[str, float]) -> float:
    """How many GPUs these `resources` have, or may have once the autoscaler has brought them."""
    return max(available.get("GPU", 0.0), available.get(GPUS_TO_COME, 0.0))


def waiting_for(num_cpus: float, num_gpus: float) -> str | None:
    """What actors of this size, or work too large for every machine, wait for, in one line.

    None where nothing waits, or Ray does not answer.
    """
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    except Exception:  # it is only asked for a line of the log
        return None

    def large_enough(bundle: dict[str, float]) -> int:
        return sum(all(node.get(name, 0) >= amount for name, amount in bundle.items()) for node in nodes)

    actor = {name: amount for name, amount in (("CPU", num_cpus), ("GPU", num_gpus)) if amount}
    demands = [of for demand in status.resource_demands.ray_task_actor_demand for of in demand.bundles_by_count]
    waiting = [of for of in demands if of.bundle == actor] or [of for of in demands if not large_enough(of.bundle)]
    if not waiting:
        return None
    of = waiting[0]
    what = ("an actor" if of.count == 1 else f"{of.count} actors") if of.bundle == actor else "a task"
    size = " and ".join(f"{amount:g} {name}" for name, amount in sorted(of.bundle.items()))
    fit = large_enough(of.bundle)
    have = f"{fit or 'none'} of {len(nodes)} machines {'is' if fit < 2 else 'are'} large enough" + ", and taken" * (
        fit > 0
    )
    coming = sum(launch.count for launch in status.pending_launches) + len(status.pending_nodes)
    failed = [launch.details for launch in status.failed_launches if launch.details]
    if coming:
        more = f"{coming} more {'is' if coming == 1 else 'are'} being started"
    elif failed:
        more = f"the last start failed: {' '.join(failed[-1].split())[:300]}"
    else:
        more = "none is being started: add one, or ask for less"
    return f"waiting for room for {what} with {size}: {have}; {more}"


def node_cpus() -> list[float]:
    """CPUs of every living node: what one task or worker can ask for at most is one node's."""
    import ray

    return [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]


def is_retry() -> bool:
    """Whether this code runs in a task whose earlier attempt ended with the death of its process or node."""
    import ray

    if not ray.is_initialized():
        return False
    # Ray counts the attempts of a task but gives the number no public name.
    worker: Any = ray._private.worker.global_worker
    return bool(worker.core_worker.get_current_task_attempt_number())


def root_cause(error: BaseException, *kinds: type[Exception]) -> BaseException:
    """The exception of one of ``kinds`` behind Ray's wrapping, for its one line; Ray's own where there is none."""
    seen: BaseException | None = error
    while seen is not None:
        # Ray's wrapper of a task's error also is an instance of that error's class: look inside it first.
        inner = getattr(seen, "cause", None) or seen.__cause__
        if isinstance(seen, kinds) and not hasattr(seen, "cause"):
            return type(seen)(str(seen).partition("\n")[0])  # Ray Data adds lines on its own settings
        seen = inner
    return error


def configure_ray_data() -> None:
    """Ray Data's settings for this process; a worker that streams data itself calls it as well."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # GPU machines may be hours in coming; Ray Data would end the job after half an hour without a block.
    context.execution_no_progress_timeout_s = -1
    # Otherwise an exception of ours arrives as text inside one of Ray's.
    context.raise_original_map_exception = True
    # The second datasource's listing task wants a whole CPU and takes no options: on a machine whose CPUs the actors
    # share it never starts, and the job hangs.
    context.use_datasource_v2 = False
    for limit in ("The minimum number of concurrent actors", "The maximum number of concurrent tasks"):
        warnings.filterwarnings("ignore", message=limit)  # in archives smaller than that
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
