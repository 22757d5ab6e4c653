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


def _answers(address: str | None) -> None:
    """Raise OSError if nothing listens at ``host:port``: Ray itself would go on trying for more than ten minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit() and "://" not in host:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()


def resources() -> dict[str, float]:
    """CPU, GPU and memory (bytes) of the whole cluster, e.g. ``{"CPU": 2.0, "memory": 8e9}``."""
    import ray

    return dict(ray.cluster_resources())


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
            return seen
        seen = inner
    return error


def configure_ray_data() -> None:
    """Ray Data's settings for this process; a worker that streams data itself calls it as well."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Otherwise an exception of ours arrives as text inside one of Ray's.
    context.raise_original_map_exception = True
    # The second datasource's listing task wants a whole CPU and takes no options: on a machine whose CPUs the actors
    # share it never starts, and the job hangs.
    context.use_datasource_v2 = False
    warnings.filterwarnings("ignore", message="The minimum number of concurrent actors")  # archives smaller than that
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
