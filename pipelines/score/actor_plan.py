"""How many GLAD actors, and how much of the machine each gets."""

from __future__ import annotations

from dataclasses import dataclass

from cluster import session
from glad_core.errors import GladError

DECODERS = 2  # decoding tasks at a time per actor, in a cluster that grows; each is a process of some 150 MB
TASKS_SHARE = 0.5  # CPUs kept free for decoding and writing
CPU_SHARE = 0.75  # of a core per CPU actor: two actors and two tasks fit on two cores
MODEL_COPIES = 3  # memory of one actor, as multiples of the weights on disk: float32 from float16, and activations
CPU_SLOTS = 16  # images in flight: more make a UNet call no faster, since its weights are read once for all of them
GPU_SLOTS = 8  # planned for; an actor takes as many as its GPU holds
MOST_GPU_SLOTS = 16
GPU_SHARE = 0.9  # of a GPU's memory; the rest is for what PyTorch cannot reuse
GPU_IMAGE = 1.6e9  # bytes per image of 512 x 512 in flight, in float32: 8 of them and the weights (4.2 GB) take 17 GB
ACTOR_MEMORY = 2**30  # bytes that torch and Ray take before any weights


@dataclass(frozen=True)
class ActorWishes:
    """What a user asks of the actors; None leaves it to `plan_actors`.

    ``num_cpus`` and ``num_gpus`` are per actor, ``batch_size`` is images in flight per actor. ``address`` is the Ray
    cluster's, None for this machine.
    """

    actors: int | None = None
    num_cpus: float | None = None
    num_gpus: float | None = None
    batch_size: int | None = None
    address: str | None = None


@dataclass(frozen=True)
class ActorPlan:
    """``actors`` processes with ``num_cpus`` and ``num_gpus`` each, computing with ``threads`` threads.

    Each has ``slots`` images in flight. ``decoders`` tasks decode at a time. If the plan ``grows``, Ray Data adds
    actors while images wait and the cluster has room, ``most`` as far as is known.
    """

    actors: int
    num_cpus: float
    num_gpus: float
    threads: int
    slots: int
    decoders: int
    grows: bool = False
    most: int = 1

    def describe(self) -> str:
        share = f"{self.num_gpus:g} GPU" if self.num_gpus else f"{self.num_cpus:g} CPU"
        more = ", more as the cluster grows" if self.grows else ""
        return f"{self.actors} actor{'s' if self.actors > 1 else ''} with {share} each{more}"


def plan_actors(available: dict[str, float], wishes: ActorWishes, weights: int) -> ActorPlan:
    """The user's wishes, completed by what fits: every GPU, or every core as far as memory allows.

    On a cluster, --actors is a fixed number that waits for room; without it the plan starts with what fits now and
    grows.

    Args:
        available: `session.resources` of the machine or cluster.
        weights: bytes of the bundle's files.

    Raises:
        GladError: more than this machine has. A cluster may grow, so nothing is refused there.
    """
    cpus, gpus = available.get("CPU", 1.0), available.get("GPU", 0.0)
    num_gpus = (1.0 if session.gpus(available) else 0.0) if wishes.num_gpus is None else wishes.num_gpus
    if num_gpus > 1 and num_gpus != int(num_gpus):
        raise GladError(f"--num-gpus {num_gpus:g}: give a fraction of one GPU, or a whole number")
    num_cpus = (CPU_SHARE if not num_gpus else 0.5) if wishes.num_cpus is None else wishes.num_cpus
    actors = wishes.actors or _fitting(available, num_cpus, num_gpus, weights)
    if wishes.address is None:
        if num_gpus * actors > gpus:
            raise GladError(
                f"{actors} actors with --num-gpus {num_gpus:g} need {num_gpus * actors:g} GPUs, "
                f"this machine has {gpus:g}: lower --actors or --num-gpus"
            )
        if num_cpus * actors > cpus - 0.25:
            raise GladError(
                f"{actors} actors with {num_cpus:g} CPUs each leave nothing of this machine's {cpus:g} for decoding: "
                "lower --actors or --num-cpus"
            )
    grows = wishes.address is not None and wishes.actors is None
    slots = wishes.batch_size or (GPU_SLOTS if num_gpus else CPU_SLOTS)
    most = max(actors, int(session.gpus(available) / num_gpus)) if grows and num_gpus else actors
    # One for every core left, no more: each is a process, and processes that start beside the actors slow them down.
    decoders = DECODERS * most if grows else max(actors, int(cpus - actors * num_cpus))
    return ActorPlan(actors, num_cpus, num_gpus, max(1, round(num_cpus)), slots, decoders, grows, most)


def gpu_slots(memory: float, weights: float, resolution: int) -> int:
    """Images in flight of an actor on a GPU, at least one.

    Args:
        memory: the actor's share of the GPU's memory, bytes.
        weights: bytes of it that networks take.
        resolution: R, pixels.
    """
    free = GPU_SHARE * memory - weights
    return max(1, min(MOST_GPU_SLOTS, int(free / (GPU_IMAGE * (resolution / 512) ** 2))))


def _fitting(available: dict[str, float], num_cpus: float, num_gpus: float, weights: int) -> int:
    cpus = available.get("CPU", 1.0)
    if num_gpus:
        return max(1, int(available.get("GPU", 0.0) / num_gpus))
    by_memory = int(available.get("memory", 0.0) / (MODEL_COPIES * weights + ACTOR_MEMORY))
    return max(1, min(int(cpus), int((cpus - TASKS_SHARE) / num_cpus) if num_cpus else 1, by_memory or 1))
