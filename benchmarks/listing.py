"""How fast an archive is listed into its manifest, on a disk and on a real S3 server.

    python benchmarks/listing.py [--json] [--images 200000] [--objects 40000] [--folders 20] [--flat 1000]

local_objects_per_s, s3_objects_per_s   entries listed, hashed and written as Parquet, by tasks on this machine's CPUs
flat_seconds_one_task     a prefix without folders on S3 by one task; each LIST takes 80 ms longer, as from far away,
                          and returns ten keys, so that few objects make many pages
flat_seconds_ranges       the same cut into ranges of keys, eight listed at a time, as 2 CPUs do
flat_split_ranges         of these, the seconds that cutting took
"""

import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from pipeline import long_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before the tests, whose folders have the same names
from conftest import find_weed, make_bucket, serve_s3

from cluster import s3, session
from cluster.storage import Storage
from pipelines.archive import pieces
from pipelines.archive.listing import list_remotely, write_manifest
from pipelines.archive.pieces import Archive, split

WRITERS = 8
LATENCY, PAGE = 0.08, 10  # seconds of a LIST, and keys in its answer


class FarServer:
    """An S3 client whose listings take longer and return short pages."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def list_objects_v2(self, **request: Any) -> Any:
        """As botocore's."""
        time.sleep(LATENCY)
        return self.client.list_objects_v2(**request)

    def get_paginator(self, name: str) -> Any:
        """As botocore's, for `paginate` alone."""
        self.pages = self.client.get_paginator(name)
        return self

    def paginate(self, **request: Any) -> Any:
        """As botocore's."""
        for page in self.pages.paginate(**request, PaginationConfig={"PageSize": PAGE}):
            time.sleep(LATENCY)
            yield page


def flat(storage: Storage, folder: Path, objects: int) -> dict[str, float]:
    """Seconds of one task and of tasks by ranges, whose rows are the same."""
    source = fill(storage, objects, 1, "flat")
    client = s3.client
    s3.client = lambda connection: FarServer(client(connection))  # type: ignore[assignment]
    pieces.LOOSE_FILES = PAGE
    archive, figures, ids = Archive(f"{source}/000", None, storage, False), {}, []
    for name in ("one_task", "ranges"):
        started = time.perf_counter()
        parts = split(archive, in_ranges=name == "ranges")
        if name == "ranges":
            figures["flat_split_ranges"] = time.perf_counter() - started
        with ThreadPoolExecutor(WRITERS) as pool:
            tasks = [
                pool.submit(write_manifest, archive, piece, n, str(folder / name)) for n, piece in enumerate(parts)
            ]
        ids.append([key for task in tasks for key in task.result()[1].tolist()])
        figures[f"flat_seconds_{name}"] = time.perf_counter() - started
    assert ids[0] == ids[1]
    assert len(ids[0]) == objects
    return figures


def measured(source: str, storage: Storage, folder: Path, images: int) -> float:
    """Entries per second of the faster of two listings; the first one also starts Ray's workers."""
    seconds = []
    for attempt in range(2):
        started = time.perf_counter()
        listed = list_remotely(source, None, storage, str(folder / f"manifest{attempt}"), False)
        seconds.append(time.perf_counter() - started)
        assert sum(listed.rows) == images
    return images / min(seconds)


def fill(storage: Storage, objects: int, folders: int, name: str = "line") -> str:
    """Write small objects into folders of equal size; returns the location of the archive."""
    each = objects // folders
    with ThreadPoolExecutor(WRITERS) as pool:
        uris = (f"s3://photos/{name}/{index // each:03d}/{index:06d}.png" for index in range(objects))
        list(pool.map(lambda uri: storage.write(uri, b"small"), uris))
    return f"s3://photos/{name}"


def main(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
    images: Annotated[int, typer.Option(help="files on the disk, in folders of a thousand; 0 for none")] = 200_000,
    objects: Annotated[int, typer.Option(help="objects on S3; 0 for none")] = 40_000,
    folders: Annotated[int, typer.Option(help="folders of these objects")] = 20,
    flat_objects: Annotated[int, typer.Option("--flat", help="objects on S3 without folders; 0 for none")] = 1000,
) -> None:
    """Measure and print."""
    figures: dict[str, float] = {"images": images, "objects": objects, "folders": folders}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if images or objects:
            session.connect()
        if images:
            figures["local_objects_per_s"] = measured(
                str(long_folder(folder, images)), Storage(), folder / "local", images
            )
        if objects or flat_objects:
            with serve_s3(find_weed(), folder) as environment:
                make_bucket(environment, "photos")
                storage = Storage(environment["AWS_ENDPOINT_URL"], "glad-test", "glad-test-secret", region="us-east-1")
                if objects:
                    source = fill(storage, objects, folders)
                    figures["s3_objects_per_s"] = measured(source, storage, folder / "s3", objects)
                if flat_objects:
                    figures |= flat(storage, folder / "flat", flat_objects)
    print(json.dumps(figures) if as_json else "\n".join(f"{name:24} {value:.6g}" for name, value in figures.items()))


if __name__ == "__main__":
    typer.run(main)
