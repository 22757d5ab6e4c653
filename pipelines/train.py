"""`glad train`: train one part of a bundle on good images with Ray Train, calibrate it, leave a new bundle.

`run_training` is the job, top to bottom: survey the images, train, calibrate, deliver. It is a Ray task, so `glad
retrain` runs many of them side by side, and it goes on from its last checkpoint whoever was killed: a worker, a node,
or the command itself, given again.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file

from cluster import session
from cluster.storage import Storage, StorageError, is_s3, join, local_path
from glad_core import bundle, samples, training
from glad_core.calibration import calibrate, judged_images
from glad_core.errors import GladError
from pipelines import training_data
from pipelines.model_source import SMALL, local_bundle
from pipelines.train_worker import FATAL, FINAL, METRICS, TrainJob, train_worker
from pipelines.training_data import DATA_CPUS, GoodImage, Survey

MAX_FAILURES = 8  # worker groups lost to killed processes and preempted nodes before a run gives up
LINE_EVERY = 10.0  # seconds between two lines of a job where there is no terminal
# What `glad train --part` starts from where the UNet's recipe in the base bundle does not speak for the part.
PART_RECIPES: dict[str, dict[str, Any]] = {
    "dino": {"steps": 300, "batch_size": 8, "learning_rate": 1e-5, "weight_decay": 0.0},
    "vae": {"steps": 500, "batch_size": 8, "learning_rate": 1e-5, "weight_decay": 0.0},
}


@dataclass(frozen=True)
class TrainRequest:
    """What `glad train` was asked; locations are local or s3://. ``None`` in ``recipe``: what the base recommends."""

    dataset: str
    category: str | None
    base: str
    out: str
    recipe: dict[str, Any]
    part: samples.Part = "unet"
    textures: str | None = None
    device: str | None = None
    workers: int = 1
    target_fpr: float = 0.05
    address: str | None = None


def train(request: TrainRequest, console: Console) -> str:
    """Run the whole job and return the new bundle's model id.

    The folder ``OUT.train`` beside the new bundle holds checkpoints and metrics while the job runs; the metrics stay.

    Raises:
        GladError, StorageError, SessionError: a mistake in what was asked, one line, before any work.
    """
    storage = Storage.from_environment()
    out = request.out.rstrip("/") if is_s3(request.out) else local_path(request.out)
    found = training_data.good_images(request.dataset, request.category, storage)
    job = plan_job(request, list(found), storage, name=" ".join(found), work=f"{out}.train")
    if storage.kind(out) != "none":
        raise GladError(f"{out} already exists: choose another --out or remove it")
    claim_work(storage, job.work)
    session.connect(request.address)
    job = with_resources(job, request.device, session.resources(), parallel=1, grows=request.address is not None)
    deliver = partial(deliver_bundle, storage=storage, out=out)
    outcome = follow({job.name: partial(run_training, job, found, request.target_fpr, deliver)}, 1, console)[job.name]
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def plan_job(request: TrainRequest, categories: list[str], storage: Storage, *, name: str, work: str) -> TrainJob:
    """The run as far as it is known before looking at the images; checks the base and the recipe."""
    base = local_bundle(request.base, storage)
    manifest = bundle.read_manifest(base)
    recommended = manifest.provenance.get("recipe", {}) if request.part == "unet" else PART_RECIPES[request.part]
    recipe = samples.Recipe(**recommended | {k: v for k, v in request.recipe.items() if v is not None})
    if recipe.batch_size % request.workers:
        raise GladError(
            f"--batch-size {recipe.batch_size} cannot be shared by {request.workers} workers: "
            f"use a multiple of {request.workers}"
        )
    if request.textures is not None:
        training_data.load_textures(request.textures, 8, storage, limit=1)
    if recipe.optimizer == "adamw8bit":
        training.adamw_8bit()
    base_uri = request.base if is_s3(request.base) or request.base == SMALL else str(base)
    return TrainJob(
        name=name,
        base=base_uri,
        part=request.part,
        recipe=recipe,
        categories=categories,
        images=[],
        textures=request.textures,
        work=work,
        storage=storage,
        workers=request.workers,
        cpus=1,
        gpus=0,
        device="cpu",
    )


def claim_work(storage: Storage, work: str) -> None:
    """The proof that the run's folder can be written, before any work."""
    try:
        storage.write(join(work, "written.txt"), b"a training run keeps its checkpoints and metrics here\n")
    except StorageError as error:
        raise StorageError(f"cannot write {work}: choose another --out ({error})") from error


def with_resources(
    job: TrainJob, device: str | None, available: dict[str, float], parallel: int, *, grows: bool
) -> TrainJob:
    """The job with its share of the cluster, ``parallel`` such jobs running at a time.

    A GPU each where there are any (or ``device`` asks for cuda). Otherwise the CPUs are shared out, but for what one
    task of each stage of the data needs to go on.

    Raises:
        GladError: more than this machine has. A cluster may grow (``grows``), so there nothing is refused.
    """
    cpus, gpus = available.get("CPU", 1.0), available.get("GPU", 0.0)
    if device == "cuda" or (device is None and gpus):
        if job.workers > gpus and not grows:
            raise GladError(f"{job.workers} workers need as many GPUs, this machine has {gpus:g}: lower --workers")
        return replace(job, cpus=1.0, gpus=1.0, device="cuda")
    if device is not None:
        _check_device(device)
    share = round((cpus - DATA_CPUS) / (job.workers * parallel), 2)
    if share < 0.25 and not grows:
        raise GladError(
            f"{job.workers * parallel} workers do not fit this machine's {cpus:g} CPUs: lower the number of workers"
        )
    return replace(job, cpus=max(share, 0.25), gpus=0.0, device=device or "cpu")


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise GladError(f"--device {device} cannot be used on this machine; try cpu") from error


Deliver = Callable[[Path, dict[str, Any]], str]
Prepare = Callable[[TrainJob, Survey], TrainJob | str]


def run_training(
    job: TrainJob,
    found: dict[str, list[GoodImage]],
    target_fpr: float,
    deliver: Deliver,
    events: Any,
    prepare: Prepare | None = None,
) -> str:
    """One training job from images to a delivered bundle; returns what ``deliver`` returns. Runs as a Ray task.

    Args:
        found: good images by category.
        deliver: called with the finished bundle's folder and what the gate needs; brings it where it belongs.
        events: queue of what the user is to see.
        prepare: called with what the survey found; says where to work, or what came of the very same run earlier.
    """
    import ray

    session.configure_ray_data()
    tell = partial(_tell, events, job.name)
    tell("survey")
    base = local_bundle(job.base, job.storage)
    manifest = bundle.read_manifest(base)
    seen = training_data.survey(found, manifest.settings["resolution"], job.storage)
    for uri, reason in seen.skipped:
        tell("survey", warning=f"{uri}: {reason}; skipped")
    if len(seen.sizes) > 1:
        tell("survey", warning=f"images of {len(seen.sizes)} sizes ({', '.join(seen.sizes[:3])}, …), all made square")
    job = replace(job, images=seen.fit)
    if prepare is not None:
        prepared = prepare(job, seen)
        if isinstance(prepared, str):
            return prepared
        job = prepared
    _check_identity(job, manifest.model_id, seen)
    checkpoint = _fit(job, events)
    finishing = ray.remote(num_cpus=job.cpus, num_gpus=job.gpus)(finish)
    return ray.get(finishing.remote(job, seen, target_fpr, checkpoint, deliver, events))


def _check_identity(job: TrainJob, base_id: str, seen: Survey) -> None:
    """Refuse the folder of a different run; a marker of an earlier failure goes, this is a new attempt."""
    identity = {
        "part": job.part,
        "base": base_id,
        "dataset": seen.fingerprint,
        "categories": job.categories,
        "recipe": job.recipe.model_dump(),
    }
    place = join(job.work, "identity.json")
    if job.storage.kind(place) == "file":
        earlier = json.loads(job.storage.read(place))
        changed = [key for key in identity if earlier.get(key) != identity[key]]
        if changed:
            raise GladError(
                f"{job.work} holds another run (different {', '.join(changed)}): remove it or choose another --out"
            )
    job.storage.write(place, json.dumps(identity, indent=1).encode())
    job.storage.delete_file(join(job.work, FATAL))


def _fit(job: TrainJob, events: Any) -> Any:
    """Ray Train over ``job.workers``; returns the last checkpoint. The same run goes on where it was."""
    from ray import train as ray_train
    from ray.train.torch import TorchTrainer

    filesystem, path = job.storage.resolve(job.work)
    folder, _, name = path.rpartition("/")
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "events": events},
        scaling_config=ray_train.ScalingConfig(
            num_workers=job.workers,
            use_gpu=job.gpus > 0,
            resources_per_worker={"CPU": job.cpus} | ({"GPU": job.gpus} if job.gpus else {}),
        ),
        run_config=ray_train.RunConfig(
            name=name,
            storage_path=folder,
            storage_filesystem=filesystem,
            failure_config=ray_train.FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=ray_train.CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        result = trainer.fit()
    except Exception as error:
        reason = _fatal(job) or " ".join(str(error).split())[:300]
        raise GladError(f"{job.name}: training failed: {reason}") from error
    fatal = _fatal(job)
    if fatal is not None:
        raise GladError(f"{job.name}: {fatal}")
    if result.checkpoint is None:
        raise GladError(f"{job.name}: training left no checkpoint in {job.work}; give the same command again")
    return result.checkpoint


def _fatal(job: TrainJob) -> str | None:
    place = join(job.work, FATAL)
    return job.storage.read(place).decode() if job.storage.kind(place) == "file" else None


def finish(job: TrainJob, seen: Survey, target_fpr: float, checkpoint: Any, deliver: Deliver, events: Any) -> str:
    """Put the trained weights into the base, calibrate on the held-out images, deliver the bundle."""
    torch.set_num_threads(job.threads)
    tell = partial(_tell, events, job.name)
    base = local_bundle(job.base, job.storage)
    device = "cuda" if job.gpus else job.device
    model = bundle.load_bundle(base, device)
    with checkpoint.as_directory() as folder:
        model = with_weights(model, job, load_file(Path(folder) / FINAL))
    half = _is_half(base)
    if half:
        model.unet.half().float()  # calibrate what will be stored
        model.vae.half().float()
    held_out = training_data.read_pixels(seen.held_out, model.settings.resolution, job.storage)
    total, done = judged_images(len(held_out)), 0

    def judged(count: int) -> None:
        nonlocal done
        done += count
        tell("calibrate", done=done, total=total)

    settings = calibrate(
        model,
        held_out,
        categories=[image.category for image in seen.held_out],
        foreground_mode=job.recipe.foreground_mode,
        target_fpr=target_fpr,
        seed=job.recipe.seed,
        on_image=judged,
    )
    manifest = bundle.read_manifest(base)
    provenance = {
        "base": manifest.model_id,
        "part": job.part,
        "dataset_fingerprint": seen.fingerprint,
        "good_images": len(seen.fit),
        "held_out_images": len(seen.held_out),
        "skipped_images": len(seen.skipped),
        "recipe": job.recipe.model_dump() if job.part == "unet" else manifest.provenance.get("recipe", {}),
        "target_fpr": target_fpr,
    }
    if job.part != "unet":
        provenance[f"{job.part}_recipe"] = job.recipe.model_dump()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "bundle"
        bundle.save_bundle(
            made,
            unet=model.unet.half() if half else model.unet,
            vae=model.vae.half() if half else model.vae,
            features=model.features,
            features_config=json.loads((base / "features/config.json").read_text()),
            final_features=None if model.final_features is model.features else model.final_features,
            prompt_cond=model.prompt_cond,
            prompt_uncond=model.prompt_uncond,
            prompts=model.prompts,
            settings=settings,
            category=",".join(job.categories),
            provenance=provenance,
            scheduler_config=json.loads((base / "scheduler/scheduler_config.json").read_text()),
        )
        tell("deliver")
        return deliver(made, {"job": job, "seen": seen, "device": device})


def with_weights(model: bundle.Model, job: TrainJob, weights: dict[str, torch.Tensor]) -> bundle.Model:
    """``model`` with the trained part; `glad_core.losses` names the parts."""

    def part(name: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}

    if job.part == "vae":
        model.vae.load_state_dict(part("vae"))
        return model
    if job.part == "dino":
        adapted = bundle.load_vit(local_bundle(job.base, job.storage) / "features", model.device)
        adapted.load_state_dict(part("vit"))
        return replace(model, final_features=adapted)
    model.unet.load_state_dict(part("unet"))
    if len(job.categories) == 1:
        return model
    prompts = dict(zip(job.categories, weights["prompts"].to(model.device).split(1), strict=True))
    return replace(model, prompts=model.prompts | prompts)


def deliver_bundle(made: Path, facts: dict[str, Any], *, storage: Storage, out: str) -> str:
    """The bundle to ``out``, its metrics beside it; checkpoints go. Returns the model id."""
    if not storage.publish(made, out, bundle.MANIFEST):
        raise GladError(f"{out} already exists: choose another --out or remove it")
    clear_work(storage, facts["job"].work, f"{out}.training.parquet")
    return bundle.read_manifest(made).model_id


def clear_work(storage: Storage, work: str, metrics: str) -> None:
    """Keep a finished run's metrics as one Parquet file; its checkpoints are of no more use."""
    filesystem, path = storage.resolve(join(work, METRICS))
    filesystem_out, path_out = storage.resolve(metrics)
    table = pq.read_table(path, filesystem=filesystem)
    pq.write_table(table.sort_by("step"), path_out, filesystem=filesystem_out)
    kept = join(work, "tensorboard")
    if storage.kind(kept) == "folder":
        Path(local_path(kept)).rename(local_path(metrics.removesuffix(".training.parquet") + ".tensorboard"))
    storage.delete_folder(work)


def _tell(
    events: Any, name: str, state: str, *, done: int = 0, total: int = 0, note: str = "", warning: str = ""
) -> None:
    events.put({"job": name, "state": state, "done": done, "total": total, "note": note, "warning": warning})


def follow(jobs: Mapping[str, Callable[[Any], str]], parallel: int, console: Console) -> dict[str, str | BaseException]:
    """Run jobs as Ray tasks, at most ``parallel`` at a time, and show what each is doing: a live line per job in a
    terminal, plain lines otherwise. Returns each one's result, or what it failed with."""
    columns = (
        TextColumn("{task.description}"),
        TextColumn("{task.fields[state]}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    outcomes: dict[str, str | BaseException] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        lines = {name: progress.add_task(name, total=None, state="waiting", note="") for name in jobs}
        shown: dict[str, tuple[str, float]] = {}
        for event in run_all(jobs, parallel):
            name, state = event["job"], event["state"]
            if event.get("warning"):
                console.print(f"[yellow]{name}: {escape(event['warning'])}[/yellow]", highlight=False, soft_wrap=True)
            if state in ("done", "failed"):
                outcomes[name] = event["outcome"]
            done, total, note = event.get("done", 0), event.get("total") or None, event.get("note", "")
            progress.update(lines[name], completed=done, total=total, state=state, note=note)
            before, when = shown.get(name, ("", 0.0))
            if not console.is_terminal and (before != state or time.monotonic() - when > LINE_EVERY):
                shown[name] = (state, time.monotonic())
                steps = f" {done} of {total}" if total else ""
                console.print(f"{name}: {state}{steps}{', ' + note if note else ''}", highlight=False)
    return outcomes


def run_all(jobs: Mapping[str, Callable[[Any], str]], parallel: int) -> Iterator[dict[str, Any]]:
    """Run ``jobs`` as Ray tasks; yields their events, each job's last one being ``done`` or ``failed``."""
    import ray
    from ray.util.queue import Empty, Queue

    # The task itself waits for others most of the time. Its node may die: it goes on from its checkpoint elsewhere.
    task = ray.remote(num_cpus=0, max_retries=MAX_FAILURES)(_call)
    events = Queue(actor_options={"num_cpus": 0})
    waiting, running = list(jobs.items()), {}  # type: ignore[var-annotated]
    while waiting or running:
        while waiting and len(running) < parallel:
            name, job = waiting.pop(0)
            running[task.remote(job, events)] = name
        try:
            yield events.get(timeout=0.2)
            continue
        except Empty:
            pass
        for ref in ray.wait(list(running), timeout=0)[0]:
            name = running.pop(ref)
            try:
                yield {"job": name, "state": "done", "outcome": ray.get(ref)}
            except Exception as error:
                yield {"job": name, "state": "failed", "outcome": session.root_cause(error, GladError, StorageError)}


def _call(job: Callable[[Any], str], events: Any) -> str:
    return job(events)


def _is_half(base: Path) -> bool:
    """Whether the base bundle keeps its UNet in float16; the new bundle then does as well."""
    with safe_open(base / "unet/diffusion_pytorch_model.safetensors", framework="pt") as weights:
        return weights.get_slice(next(iter(weights.keys()))).get_dtype() == "F16"
