"""Requests that `glad score` sends to an S3 server, per image and per shard.

    python benchmarks/s3_requests.py [--json] [--images 400]

Archive and results are on a real S3 server; a proxy before it counts every request of one whole command on this
machine. An image is to cost one request. Every request of a shard, beside those for its images, is one that a job
of ten million images sends twenty thousand times.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs, urlsplit

import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests/integration"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before the tests, whose folders have the same names
from conftest import make_bucket, make_tiny_bundle, photo, serve_s3
from test_faults_s3 import unreliable

from cluster.storage import Storage

ARCHIVE, OUT = "s3://photos/archive", "s3://verdicts/run"
OF_A_SHARD = re.compile(r"staging|commits|results|errors|manifest|plan.*\.json")  # a commit looks for a later plan


def fill(folder: Path, storage: Storage, images: int) -> None:
    """Write small smooth pictures."""

    def write(index: int) -> None:
        path = photo(index % 50, folder / "photos" / f"{index}.png")
        storage.write(f"{ARCHIVE}/{index:05d}.png", path.read_bytes())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(images)))


def kind(method: str, path: str) -> tuple[str, str]:
    """What a request is about (``image``, ``shard`` or ``other``), and its name in the table."""
    parts = urlsplit(path)
    asked = parse_qs(parts.query, keep_blank_values=True)
    key = f"{parts.path}/{''.join(asked['prefix'])}" if "prefix" in asked else parts.path
    names = [name for name in key.split("/") if name]
    words = [word for word in ("uploads", "uploadId", "prefix") if word in asked]
    if names[0] == "photos":
        about = "image" if names[-1].endswith(".png") and not words else "other"
        return about, " ".join([method, "archive", *words])
    folder = names[2] if len(names) > 2 else names[-1]
    folder = "probe" if folder.startswith(".probe") else folder
    return "shard" if OF_A_SHARD.fullmatch(folder) else "other", " ".join([method, folder, *words])


def measure(images: int) -> dict[str, Any]:
    """Score an archive of so many images; returns the figures that are printed."""
    weed = shutil.which("weed") or str(Path(sys.executable).parent / "weed")
    with tempfile.TemporaryDirectory(prefix="q") as name, serve_s3(weed, Path(name)) as environment:
        folder = Path(name)
        for bucket in ("photos", "verdicts"):
            make_bucket(environment, bucket)
        storage = Storage(environment["AWS_ENDPOINT_URL"], "glad-test", "glad-test-secret", region="us-east-1")
        fill(folder, storage, images)
        bundle = make_tiny_bundle(folder / "tiny")
        glad = str(Path(sys.executable).parent / "glad")
        command = [glad, "score", ARCHIVE, "--model", str(bundle), "--out", OUT, "--actors", "1"]
        quiet = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        with unreliable(environment["AWS_ENDPOINT_URL"]) as (through_proxy, faults):
            subprocess.run(command, check=True, env=os.environ | through_proxy | quiet, stdout=sys.stderr)
        shards = sum(1 for _ in storage.walk(f"{OUT}/commits"))
    requests = [kind(method, path) for method, path in faults["seen"]]
    about = Counter(what for what, _ in requests)
    return {
        "images": images,
        "shards": shards,
        "requests_per_image": round(about["image"] / images, 3),
        "requests_per_shard": round(about["shard"] / shards, 2),
        "other_requests": about["other"],
        "by_kind": dict(Counter(name for _, name in requests).most_common()),
    }


def main(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
    images: Annotated[int, typer.Option(help="images in the archive")] = 400,
) -> None:
    """Measure and print."""
    figures = measure(images)
    print(json.dumps(figures) if as_json else "\n".join(f"{name:20} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    typer.run(main)
