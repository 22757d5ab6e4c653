"""What a writer of results carries: CPU and bytes of 512 x 512 maps, now and as it was before November 2026.

    python benchmarks/writers.py [--json] [--images 85] [--repeat 5]

writer_images_per_second_512         of full maps in one core, divided by the same of before: both in this run
images_per_s_before, images_per_s_now, bytes_per_image_before, bytes_per_image_now   of these maps
*_noise, *_token, *_reconstructions  the same for maps with noise in every pixel, maps of 64 x 64 tokens, and full maps
                                     with a reconstruction as PNG
peak_mb                              memory that a call takes beside its rows, in MB (2**20 bytes)

A call holds one shard: 85 images of 512 x 512 are 64 MiB of pixels. Its files go to a disk.
"""

import io
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import typer
from PIL import Image
from torch.nn.functional import interpolate

from cluster.storage import Storage
from glad_core.bundle.settings import Settings
from glad_core.scoring import full_size_map
from pipelines.runs.run import Run
from pipelines.runs.schema import ERRORS_SCHEMA, RESULTS_SCHEMA, SCORED_SCHEMA
from pipelines.runs.write import ResultsWriter

SIDE, TOKENS = 512, 64


def token_map(generator: torch.Generator) -> torch.Tensor:
    """A map [64, 64] as a ViT's: small random values, with a blob of higher ones."""
    values = torch.rand(1, 1, 16, 16, generator=generator) * 0.1
    tokens = interpolate(values, size=(TOKENS, TOKENS), mode="bicubic")[0, 0]
    tokens += torch.rand(TOKENS, TOKENS, generator=generator) * 0.05
    tokens[20:30, 24:40] += 0.5
    return tokens


def rows(kind: str, images: int) -> pa.Table:
    """A shard of `SCORED_SCHEMA` rows."""
    generator = torch.Generator().manual_seed(0)
    made: list[dict[str, Any]] = []
    for index in range(images):
        tokens = token_map(generator).half()
        full = full_size_map(tokens[None].float(), Settings(resolution=SIDE))[0]
        if kind == "noise":
            full = full + torch.rand(SIDE, SIDE, generator=generator) * 0.05
        values = (tokens if kind == "token" else full.half()).numpy()
        made.append(
            {
                "image_id": f"{index:032x}",
                "uri": f"s3://photos/line/{index:08d}.png",
                "category": "bolt",
                "model_id": "0123456789abcdef",
                "score": float(values.max()),
                "threshold": 0.5,
                "is_anomalous": True,
                "stop_step": 101,
                "stop_reason": "min_step",
                "steps": [{"timestep": 400 - step, "score": step / 7} for step in range(10)],
                "anomaly_map": values.ravel(),
                "map_height": values.shape[0],
                "map_width": values.shape[1],
                "reconstruction": png(generator) if kind == "reconstructions" else None,
                "width": SIDE,
                "height": SIDE,
                "seconds": 0.1,
                "position": index,
            }
        )
    return pa.Table.from_pylist(made, schema=SCORED_SCHEMA)


def png(generator: torch.Generator) -> bytes:
    """A photo with sensor noise."""
    smooth = interpolate(torch.rand(1, 3, 8, 8, generator=generator) * 200, size=(SIDE, SIDE), mode="bicubic")[0]
    noisy = smooth.clamp(0, 250) + torch.rand(3, SIDE, SIDE, generator=generator) * 5
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(noisy.byte().permute(1, 2, 0).numpy())).save(stream, "PNG")
    return stream.getvalue()


def write_before(table: pa.Table, folder: Path) -> int:
    """What a writer did: columns of any kind with zstd and a dictionary, rows filtered by shard, error and category."""
    shard = table.filter(pc.equal(pc.divide(table["position"], len(table)), 0))
    failed = pc.is_valid(shard["error_type"])
    results = shard.filter(pc.invert(failed)).select(RESULTS_SCHEMA.names).cast(RESULTS_SCHEMA)
    shard.filter(failed).select(ERRORS_SCHEMA.names).cast(ERRORS_SCHEMA)
    written = 0
    for category in pc.unique(results["category"]).to_pylist():
        stream = io.BytesIO()
        part = results.filter(pc.equal(results["category"], category))
        pq.write_table(part, stream, compression="zstd")
        Storage().write(str(folder / f"{time.time_ns()}.parquet"), stream.getvalue())
        written += len(stream.getvalue())
    return written


def write_now(table: pa.Table, folder: Path) -> int:
    """What a writer does."""
    (written,) = ResultsWriter(Run.at(str(folder)), len(table), 1, "staging/1-a")(table).to_pylist()
    return int(written["sizes"][0])


def seconds_of_cpu(writes: list[Callable[[pa.Table, Path], int]], table: pa.Table, repeat: int) -> list[float]:
    """CPU seconds of the quickest call of each, taken in turns: other work on the machine meets both."""
    quickest = [float("inf")] * len(writes)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeat):
            for number, write in enumerate(writes):
                started = time.process_time()
                write(table, Path(folder))
                quickest[number] = min(quickest[number], time.process_time() - started)
    return quickest


def peak_mb(table: pa.Table) -> float:
    """Most memory that a call adds to the process, looked at every millisecond."""
    process, stop = psutil.Process(), threading.Event()

    def watch() -> Iterator[int]:
        while not stop.wait(0.001):
            yield process.memory_info().rss

    peaks: list[int] = []
    pa.default_memory_pool().release_unused()
    before = process.memory_info().rss
    watcher = threading.Thread(target=lambda: peaks.append(max(watch(), default=before)))
    watcher.start()
    with tempfile.TemporaryDirectory() as folder:
        write_now(table, Path(folder))
    stop.set()
    watcher.join()
    return (peaks[0] - before) / 2**20


def measure(images: int = 85, repeat: int = 5) -> dict[str, float]:
    """All figures."""
    figures: dict[str, float] = {"images": images}
    for kind, suffix in (("full", ""), ("noise", "_noise"), ("token", "_token"), ("reconstructions", None)):
        suffix = "_reconstructions" if suffix is None else suffix
        table = rows(kind, images)
        if kind == "reconstructions":
            figures["peak_mb"] = peak_mb(table)
        before, now = seconds_of_cpu([write_before, write_now], table, repeat)
        with tempfile.TemporaryDirectory() as folder:
            for name, write, cpu in (("before", write_before, before), ("now", write_now, now)):
                figures[f"images_per_s_{name}{suffix}"] = images / cpu
                figures[f"bytes_per_image_{name}{suffix}"] = write(table, Path(folder)) / images
        figures[f"writer_images_per_second_512{suffix}"] = before / now
    return figures


def main(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
    images: Annotated[int, typer.Option(help="of a shard")] = 85,
    repeat: Annotated[int, typer.Option(help="calls of which the quickest counts")] = 5,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    figures = measure(images, repeat)
    print(json.dumps(figures) if as_json else "\n".join(f"{name:45} {value:.4g}" for name, value in figures.items()))


if __name__ == "__main__":
    typer.run(main)
