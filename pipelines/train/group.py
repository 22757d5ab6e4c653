"""The workers of one training run under Ray Train, led by a thread of the command's own process.

Ray Train would start five processes to lead a run, most of them on the cluster's head, 1.5 GB in all: for forty
categories more than a head has. Here its controller runs in the thread that waits for the result anyway, and what
remains is one process of 70 MB, `Meeting`. If the command ends, Ray frees all that its runs hold.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup, worker_group
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from pipelines.train.meeting import Meeting
from pipelines.train.spec import TrainJob

MAX_FAILURES = 8  # worker groups lost to killed processes and preempted nodes before a run gives up
QUIET = {
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",  # it would set up the logs of the command's process
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process that only tells what the death of the node tells as well
}


def run_group(work: Callable[[dict[str, Any]], None], config: dict[str, Any], job: TrainJob) -> Any:
    """Run ``work`` in ``job.workers`` processes; returns the last checkpoint that they reported.

    A group that loses a process begins again from its last checkpoint, at most `MAX_FAILURES` times.

    Raises:
        ray.train.TrainingFailedError: with the failure of the last attempt.
    """
    os.environ.update(QUIET)
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # tracebacks of what it then tries again
    filesystem, path = job.storage.resolve(job.work)
    folder, _, name = path.rpartition("/")
    trainer = _Trainer(
        work,
        train_loop_config=config,
        backend_config=_ProcessGroup(),
        scaling_config=ScalingConfig(
            num_workers=job.workers, use_gpu=job.gpus > 0, resources_per_worker=job.worker_resources
        ),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    return trainer.fit().checkpoint


class _Trainer(DataParallelTrainer):
    def _create_default_callbacks(self) -> list[Any]:
        # The cleaner frees what a dead controller held: here Ray does so when the command ends. There are no datasets.
        absent = (PlacementGroupCleanerCallback, DatasetsCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, absent)]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        controller = _Controller(**settings)
        asyncio.run(controller.run())
        return controller.get_result()


class _Group(WorkerGroup):
    def _init_train_context_on_workers(self, workers: Any, sync_actor: Any, train_context_args: dict[str, Any]) -> None:
        """As Ray Train does it, but without a handle of the controller, which is no actor."""
        tasks = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[number] for name, values in train_context_args.items()},
            )
            for number, worker in enumerate(workers)
        ]
        ray.get(tasks)


class _Controller(TrainController):
    worker_group_cls = _Group


worker_group.SynchronizationActor = ray.remote(num_cpus=0)(Meeting)  # type: ignore[misc,assignment]


class _ProcessGroup(BackendConfig):
    """PyTorch's process group, if there are several workers. (Ray Train's own would import PyTorch here.)"""

    @property
    def backend_cls(self) -> type[Backend]:
        return _JoinedWorkers


class _JoinedWorkers(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        world = len(worker_group)
        if world > 1:
            meeting = worker_group.execute_single(0, _free_address)
            ray.get([worker_group.execute_single_async(rank, _join, meeting, rank, world) for rank in range(world)])


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"


def _join(address: str, rank: int, world: int) -> None:
    import torch.distributed

    gpu = torch.cuda.is_available() and bool(ray.get_gpu_ids())
    torch.distributed.init_process_group("nccl" if gpu else "gloo", address, rank=rank, world_size=world)
