"""The checks of `glad doctor`: installation, devices, machine, Ray cluster and storage, each with advice if wrong."""

from __future__ import annotations

import platform
import resource
import shutil
import sys
import tempfile
import uuid
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster import session
from cluster.storage import Storage, StorageError, join

DISTRIBUTION = "glad-ray"
DISK_GB, MEMORY_GB, OPEN_FILES = 5.0, 4.0, 4096  # with less, small archives work but large ones may fail
COLOURS = {"ok": "green", "warning": "yellow", "wrong": "red"}


@dataclass(frozen=True)
class Finding:
    """The outcome of one check: ``wrong`` stops a job, ``warning`` may stop one. ``advice`` is empty if ``ok``."""

    what: str
    state: Literal["ok", "warning", "wrong"]
    found: str
    advice: str = ""
    package: bool = False


def examine(address: str | None, location: str | None) -> list[Finding]:
    """Checks packages, devices, this machine and Ray, here or the cluster given; the storage location, if given."""
    findings = [*packages(), *devices(), *machine()]
    findings.append(ray_here() if address is None else cluster(address))
    if location is not None:
        findings.append(storage(location, Storage.from_environment()))
    return findings


def packages() -> list[Finding]:
    """Checks Python and every required package against the version ranges in the installed metadata."""
    try:
        distribution = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return [Finding("glad-ray", "wrong", "not installed", "pip install the folder or wheel that it came in")]
    findings = [Finding("glad-ray", "ok", distribution["Version"])]
    python = platform.python_version()
    versions = distribution["Requires-Python"] or ""
    fits = SpecifierSet(versions).contains(python)
    findings.append(Finding("Python", "ok" if fits else "wrong", python, "" if fits else f"install Python {versions}"))
    for line in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            findings.append(package(requirement))
    return findings


def package(requirement: Requirement) -> Finding:
    """Checks the installed version of one package."""
    advice = f"pip install '{requirement}'"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(requirement.name, "wrong", "not installed", advice, package=True)
    if requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, "ok", version, package=True)
    return Finding(requirement.name, "wrong", f"{version}, needs {requirement.specifier}", advice, package=True)


def devices() -> list[Finding]:
    """Lists the devices of PyTorch with their precisions, and checks that each GPU computes."""
    import torch

    findings = [Finding("device cpu", "ok", f"{torch.get_num_threads()} threads, float32 bfloat16")]
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        properties = f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, float32 float16"
        properties += " bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else ""
        findings.append(_gpu(f"cuda:{number}", properties))
    if torch.backends.mps.is_available():
        findings.append(_gpu("mps", "float32 float16"))
    if len(findings) == 1 and shutil.which("nvidia-smi"):
        advice = "install the PyTorch build for this driver: https://pytorch.org/get-started/locally"
        findings.append(Finding("device cuda", "warning", "an NVIDIA driver, but PyTorch sees no GPU", advice))
    return findings


def _gpu(device: str, properties: str) -> Finding:
    """Computes one small product: a GPU that PyTorch lists may still refuse to work."""
    import torch

    what = f"device {device}"
    try:
        ones = torch.ones(8, 8, device=device)
        ones.matmul(ones).sum().item()
    except RuntimeError as error:
        advice = "check the driver; to do without the GPU, set CUDA_VISIBLE_DEVICES to nothing"
        return Finding(what, "wrong", str(error).splitlines()[0], advice)
    return Finding(what, "ok", properties)


def machine() -> list[Finding]:
    """Checks disk space, memory and the limit of open files."""
    free = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    memory = psutil.virtual_memory().available / 1e9  # the machine's; a container's limit may be lower
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return [
        _enough("disk", free, DISK_GB, f"GB free in {tempfile.gettempdir()}", "free some, or set RAY_TMPDIR elsewhere"),
        _enough("memory", memory, MEMORY_GB, "GB available", "end other programs, or give --actors 1"),
        _enough("open files", files, OPEN_FILES, "at most", f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}"),
    ]


def _enough(what: str, amount: float, least: float, unit: str, advice: str) -> Finding:
    shown = f"{amount:.1f} {unit}" if isinstance(amount, float) else f"{amount} {unit}"
    return Finding(what, "ok", shown) if amount >= least else Finding(what, "warning", shown, advice)


def ray_here() -> Finding:
    """Starts Ray on this machine, once, as every job does."""
    try:
        session.connect(None)
    except session.SessionError as error:
        return Finding("Ray", "wrong", str(error), "free memory and disk; `ray stop` ends what is left of an older one")
    return Finding("Ray", "ok", f"starts here: {session.resources().get('CPU', 0):g} CPUs")


def cluster(address: str) -> Finding:
    """Checks that a Ray cluster answers, and lists its CPUs and GPUs."""
    try:
        session.connect(address)
    except session.SessionError as error:
        return Finding("Ray cluster", "wrong", str(error), "is it up (`ray status` there)? is the port reachable?")
    resources = session.resources()
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    return Finding("Ray cluster", "ok", f"{address}: {cpus:g} CPUs, {gpus:g} GPUs")


def storage(location: str, access: Storage) -> Finding:
    """Checks that a file at ``location`` can be written, read, not created a second time, and deleted."""
    probe = join(location, f".glad-doctor-{uuid.uuid4().hex}")
    try:
        access.check_creates(location)
        access.write(probe, b"probe")
        try:
            if access.read(probe) != b"probe":
                return Finding("storage", "wrong", f"{location}: returns other bytes than were written", "use another")
        finally:
            access.delete_file(probe)
    except (StorageError, OSError) as error:
        return Finding("storage", "wrong", " ".join(str(error).split()), "give a folder that can be written")
    return Finding("storage", "ok", f"{location}: written, read, not overwritten, deleted")


def print_table(findings: list[Finding], console: Console) -> None:
    """Print the findings as a table; packages that are as required are one row of it."""
    sound = [finding for finding in findings if finding.package and finding.state == "ok"]
    table = Table("what", "state", "found", "what to do")
    if sound:
        table.add_row("packages", "[green]ok[/]", f"{len(sound)} as required", "")
    for finding in (finding for finding in findings if finding not in sound):
        state = f"[{COLOURS[finding.state]}]{finding.state}[/]"
        table.add_row(finding.what, state, escape(finding.found), escape(finding.advice))
    console.print(table, highlight=False)


def as_result(findings: list[Finding]) -> dict[str, Any]:
    """The result that `--json` prints."""
    return {"python": sys.executable, "findings": [asdict(finding) for finding in findings]}
