"""How fast an archive is listed into its manifest, on a disk and on a real S3 server.

    python benchmarks/listing.py [--json] [--images 200000] [--objects 40000] [--folders 20]

local_objects_per_s, s3_objects_per_s   entries listed, hashed and written as Parquet, by tasks on this machine's CPUs
"""

import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from pipeline import long_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before the tests, whose folders have the same names
from conftest import find_weed, make_bucket, serve_s3

from cluster import session
from cluster.storage import Storage
from pipelines.archive.listing import list_remotely

WRITERS = 8


def measured(source: str, storage: Storage, folder: Path, images: int) -> float:
    """Entries per second of the faster of two listings; the first one also starts Ray's workers."""
    seconds = []
    for attempt in range(2):
        started = time.perf_counter()
        listed = list_remotely(source, None, storage, str(folder / f"manifest{attempt}"), False)
        seconds.append(time.perf_counter() - started)
        assert sum(listed.rows) == images
    return images / min(seconds)


def fill(storage: Storage, objects: int, folders: int) -> str:
    """Write small objects into folders of equal size; returns the location of the archive."""
    each = objects // folders
    with ThreadPoolExecutor(WRITERS) as pool:
        uris = (f"s3://photos/line/{index // each:03d}/{index:06d}.png" for index in range(objects))
        list(pool.map(lambda uri: storage.write(uri, b"small"), uris))
    return "s3://photos/line"


def main(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
    images: Annotated[int, typer.Option(help="files on the disk, in folders of a thousand; 0 for none")] = 200_000,
    objects: Annotated[int, typer.Option(help="objects on S3; 0 for none")] = 40_000,
    folders: Annotated[int, typer.Option(help="folders of these objects")] = 20,
) -> None:
    """Measure and print."""
    figures: dict[str, float] = {"images": images, "objects": objects, "folders": folders}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        session.connect()
        if images:
            figures["local_objects_per_s"] = measured(
                str(long_folder(folder, images)), Storage(), folder / "local", images
            )
        if objects:
            with serve_s3(find_weed(), folder) as environment:
                make_bucket(environment, "photos")
                storage = Storage(environment["AWS_ENDPOINT_URL"], "glad-test", "glad-test-secret", region="us-east-1")
                source = fill(storage, objects, folders)
                figures["s3_objects_per_s"] = measured(source, storage, folder / "s3", objects)
    print(json.dumps(figures) if as_json else "\n".join(f"{name:24} {value:.6g}" for name, value in figures.items()))


if __name__ == "__main__":
    typer.run(main)
