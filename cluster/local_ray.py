"""Ray on this machine, in a process of its own that `session.connect` starts: this file run as a program.

A start that takes too long can be killed whole and tried again; no signal of the terminal reaches Ray; and Ray ends
with the command, however that ends: a closed standard input is the sign.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import select
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import psutil

LOOK_EVERY = 0.5  # seconds between two looks at Ray's processes
END_SECONDS = 5.0  # for killed processes to be gone
# Ports of Ray's agents: below those that Linux gives to outgoing connections, which could take one in the meantime.
PORTS = range(20000, 32000)


class LocalRay:
    """The process from the side of the command that starts it. Raises nothing of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__],  # -P: this folder is no place to import from
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C and the end of a terminal are for the command, which then ends Ray
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.request, self.answers = self.process.stdin, self.process.stdout

    def answer(self, seconds: float) -> dict[str, str]:
        """Its ``address``, or the ``error`` that kept Ray from starting."""
        if not select.select([self.answers], [], [], seconds)[0]:
            return {"error": f"not ready within {seconds:g} seconds"}
        return json.loads(self.answers.readline() or '{"error": "its process died"}')

    def wait_for_death(self) -> None:
        """Block until Ray has ended."""
        self.answers.read()

    def end(self) -> None:
        """End Ray: on request, or by force if it does not react. Returns when no process of it is left."""
        self.request.close()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            kill_children(self.process.pid)
            self.process.kill()
            self.process.wait()


def main() -> None:
    """The process itself. The first line of its standard output is JSON (`LocalRay.answer`), the end its death."""
    request, answers = os.dup(0), os.fdopen(os.dup(1), "w")  # copies that Ray's processes do not inherit
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    threading.Thread(target=_end_on_request, args=(request,), daemon=True).start()
    try:
        node = start_node()
        print(json.dumps({"address": node.gcs_address}), file=answers, flush=True)
        while node.remaining_processes_alive():
            time.sleep(LOOK_EVERY)
    except Exception as error:  # Ray raises plain ones
        print(json.dumps({"error": " ".join(str(error).split())[:300]}), file=answers, flush=True)
    kill_children(os.getpid())


def _end_on_request(request: int) -> None:
    os.read(request, 1)
    kill_children(os.getpid())
    os._exit(0)


def start_node() -> Any:
    """Ray's GCS and raylet with all of this machine, as ``ray.init`` starts them, but sooner.

    A raylet waits 15 seconds for the ports that its agents choose, and then aborts. On a busy machine those Python
    programs are not even imported by then, so the ports are chosen here. The autoscaler, the log monitor and the
    dashboard would be three more programs to import, and have no use here.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # a Mac may allow fewer
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65536), most))  # as `ray.init` does: Ray opens many files

    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    class HeadNode(Node):
        def start_api_server(self, **_: Any) -> None:
            self._webui_url = ""  # as without a dashboard

    ensure_token_if_auth_enabled(create_token_if_missing=True)
    agent, listen, export, environments = free_ports(4)
    parameters = RayParams(
        include_dashboard=False,
        no_monitor=True,
        include_log_monitor=False,  # type: ignore[arg-type]  # as Ray's own code has it
        metrics_agent_port=agent,
        dashboard_agent_listen_port=listen,
        metrics_export_port=export,
        runtime_env_agent_port=environments,
    )
    return HeadNode(parameters, head=True, shutdown_at_exit=False, spawn_reaper=True, ray_init_cluster=True)


def free_ports(count: int) -> list[int]:
    """Different ports of `PORTS` that nobody uses."""
    free: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            free.append(port)
        if len(free) == count:
            break
    return free


def kill_children(pid: int) -> None:
    """Kill every process below ``pid``, and return when they are gone. Nothing of a session outlives it anyway."""
    with contextlib.suppress(psutil.NoSuchProcess):
        processes = psutil.Process(pid).children(recursive=True)
        for process in processes:  # the raylet before its workers, which it would replace
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, END_SECONDS)


if __name__ == "__main__":
    main()
