"""`glad doctor`: what of machine, installation, Ray and storage is not as GLAD needs it, and what to do."""

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
DISK_GB, MEMORY_GB, OPEN_FILES = 5.0, 4.0, 4096  # below these small archives work and large ones may not
COLOURS = {"ok": "green", "warning": "yellow", "wrong": "red"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at: ``wrong`` stops a job, ``warning`` may. ``advice`` is empty where all is well."""

    what: str
    state: Literal["ok", "warning", "wrong"]
    found: str
    advice: str = ""


def examine(address: str | None, location: str | None) -> list[Finding]:
    """Everything but what nobody asked for: a cluster and a storage location are looked at where given."""
    findings = [*packages(), *devices(), *machine()]
    if address is not None:
        findings.append(cluster(address))
    if location is not None:
        findings.append(storage(location, Storage.from_environment()))
    return findings


def packages() -> list[Finding]:
    """Python and every package GLAD needs, against the ranges in the installed metadata."""
    try:
        about = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return [Finding("glad-ray", "wrong", "not installed", "pip install it, or `make` its environment")]
    found = [Finding("glad-ray", "ok", about["Version"])]
    python = platform.python_version()
    wanted = about["Requires-Python"] or ""
    fits = SpecifierSet(wanted).contains(python)
    found.append(Finding("Python", "ok" if fits else "wrong", python, "" if fits else f"install Python {wanted}"))
    for line in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found.append(package(requirement))
    return found


def package(requirement: Requirement) -> Finding:
    """One requirement against what is installed."""
    advice = f"pip install '{requirement}'"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(requirement.name, "wrong", "not installed", advice)
    if requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, "ok", version)
    return Finding(requirement.name, "wrong", f"{version}, needs {requirement.specifier}", advice)


def devices() -> list[Finding]:
    """What PyTorch can compute on and in which precisions."""
    import torch

    found = [Finding("device cpu", "ok", f"{torch.get_num_threads()} threads, float32 bfloat16")]
    for number in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(number)
        names = f"{of.name}, {of.total_memory / 1e9:.0f} GB, float32 float16"
        names += " bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else ""
        found.append(_runs(f"device cuda:{number}", names))
    if torch.backends.mps.is_available():
        found.append(_runs("device mps", "float32 float16"))
    if len(found) == 1 and shutil.which("nvidia-smi"):
        advice = "install the PyTorch build for this driver: https://pytorch.org/get-started/locally"
        found.append(Finding("device cuda", "warning", "an NVIDIA driver, but PyTorch sees no GPU", advice))
    return found


def _runs(what: str, names: str) -> Finding:
    """A GPU that is listed may still refuse to work: one small product on it."""
    import torch

    try:
        torch.ones(8, 8, device=what.removeprefix("device ")).matmul(torch.ones(8, 8, device=what[7:])).sum().item()
    except RuntimeError as error:
        return Finding(what, "wrong", str(error).splitlines()[0], "check the driver; run with CUDA_VISIBLE_DEVICES=")
    return Finding(what, "ok", names)


def machine() -> list[Finding]:
    """Disk, memory and open files."""
    free = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    memory = psutil.virtual_memory().available / 1e9  # the machine's; a container's limit may be lower
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return [
        _enough("disk", free, DISK_GB, f"GB free in {tempfile.gettempdir()}", "free some, or set RAY_TMPDIR elsewhere"),
        _enough("memory", memory, MEMORY_GB, "GB available", "end other programs, or give --actors 1"),
        _enough("open files", files, OPEN_FILES, "at most", f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}"),
    ]


def _enough(what: str, has: float, needs: float, unit: str, advice: str) -> Finding:
    shown = f"{has:.1f} {unit}" if isinstance(has, float) else f"{has} {unit}"
    return Finding(what, "ok", shown) if has >= needs else Finding(what, "warning", shown, advice)


def cluster(address: str) -> Finding:
    """Whether a Ray cluster answers, and what it has."""
    try:
        session.connect(address)
    except session.SessionError as error:
        return Finding("Ray cluster", "wrong", str(error), "is it up (`ray status` there)? is the port reachable?")
    has = session.resources()
    return Finding("Ray cluster", "ok", f"{address}: {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs")


def storage(location: str, access: Storage) -> Finding:
    """Whether a file can be written, read back, created only once, and deleted at ``location``."""
    probe = join(location, f".glad-doctor-{uuid.uuid4().hex}")
    try:
        access.write(probe, b"probe")
        try:
            if access.read(probe) != b"probe":
                return Finding("storage", "wrong", f"{location}: other bytes came back than went in", "use another")
            if access.create(probe, b"second"):
                return Finding(
                    "storage", "wrong", f"{location}: overwrites where it must not", "it has to honour If-None-Match"
                )
        finally:
            access.delete_file(probe)
    except (StorageError, OSError) as error:
        return Finding("storage", "wrong", " ".join(str(error).split()), "see docs/troubleshooting.md")
    return Finding("storage", "ok", f"{location}: written, read, not overwritten, deleted")


def report(findings: list[Finding], console: Console) -> None:
    """Print the findings as a table."""
    table = Table("what", "state", "found", "what to do")
    for of in findings:
        table.add_row(of.what, f"[{COLOURS[of.state]}]{of.state}[/]", *map(escape, (of.found, of.advice)))
    console.print(table, highlight=False)


def as_result(findings: list[Finding]) -> dict[str, Any]:
    """The findings for `--json`."""
    return {"python": sys.executable, "findings": [asdict(of) for of in findings]}
