"""From manifest rows to pixels: fetch the bytes, decode them, resize. A failure becomes the row's error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import pyarrow as pa

from cluster.storage import Storage
from glad_core.decoding.picture import ImageError
from glad_core.views import Framing
from pipelines.archive.decoder import SECONDS, decoder
from pipelines.archive.fetch import FETCH_THREADS, Row, fetch, neighbours
from pipelines.archive.uris import page_id, page_uri

Pages = Literal["all", "first"]
UNJUDGED = "pages: thumbnails, masks and previews, or those after the first"


@dataclass(frozen=True)
class Reading:
    """How a job reads its images.

    Attributes:
        source: the archive, absolute; see `fetch`.
        seconds: of CPU time that decoding one page may take.
        pages: of a file that are judged.
    """

    source: str | None = None
    seconds: int = SECONDS
    pages: Pages = "all"


READING = Reading()
DECODED_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("category", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        # The pixels of its frame in every view, one after the other; null if there is an error. Large: a block of huge
        # pictures may have more than 2 GiB.
        ("image", pa.large_binary()),
        ("peak", pa.float64()),  # as of a `Picture`
        ("stage", pa.string()),
        ("error_type", pa.string()),
        ("message", pa.string()),
        ("position", pa.int64()),
        ("further", pa.bool_()),  # not the first page of its file
        ("shard_pages", pa.int64()),  # rows of its shard that are
        ("unjudged", pa.int64()),  # of its file's first page: pages that get no row
    ]
)


def fetch_and_decode(
    storage: Storage,
    framings: Callable[[str | None], int | Sequence[Framing]],
    reading: Reading = READING,
    elsewhere: Callable[[], Iterable[Row]] = tuple,
) -> Callable[[pa.Table], pa.Table]:
    """A stage: the manifest rows of a shard in, `DECODED_SCHEMA` rows out, one for each page.

    It raises only if storage does not answer.

    Args:
        framings: how the views of a category's model frame an image.
        elsewhere: manifest rows from all over the archive, see ``others`` of `fetch`.
    """

    def stage(rows: pa.Table) -> pa.Table:
        manifest = rows.to_pylist()

        def fetch_row(row: Row) -> bytes | ImageError | None:
            return _fetch_row(storage, row, lambda: chain(neighbours(row, manifest), elsewhere()), reading.source)

        with ThreadPoolExecutor(FETCH_THREADS) as pool:
            fetched = list(pool.map(fetch_row, manifest))
        # One by one, so that each has the whole memory budget; several tasks decode in parallel.
        decoded = [
            decoded_row
            for row, data in zip(manifest, fetched, strict=True)
            for decoded_row in _decode_file(row, data, framings(row["category"]), reading)
        ]
        pages = {"shard_pages": sum(row["further"] for row in decoded)}
        return pa.Table.from_pylist([row | pages for row in decoded], schema=DECODED_SCHEMA)

    return stage


def _fetch_row(
    storage: Storage, row: Row, others: Callable[[], Iterable[Row]], source: str | None
) -> bytes | ImageError | None:
    if row.get("error_type"):  # already lost while listing, e.g. a damaged tar shard
        return None
    try:
        return fetch(storage, row, others, source)
    except ImageError as error:
        return error


def _decode_file(
    row: Row, data: bytes | ImageError | None, framings: int | Sequence[Framing], reading: Reading
) -> Iterator[dict[str, Any]]:
    """A row for each page that is judged; the first has the id and URI of the file."""
    out = _kept(row) | {"further": False, "unjudged": 0}
    if data is None:
        yield out | {name: row[name] for name in ("stage", "error_type", "message")}
        return
    if isinstance(data, ImageError):
        yield out | {"stage": "fetch", "error_type": data.kind, "message": str(data)}
        return
    try:
        numbers, count = decoder(reading.seconds).pages(data)
        numbers = numbers[:1] if reading.pages == "first" else numbers
    except ImageError as error:
        yield out | _failed(error)
        return
    out["unjudged"] = count - len(numbers)
    for number in numbers:
        if number != numbers[0]:
            names = {"image_id": page_id(row["image_id"], number), "uri": page_uri(row["uri"], number)}
            out = out | names | {"further": True, "unjudged": 0}
        yield out | _decode_page(data, framings, number, reading.seconds)


def _decode_page(data: bytes, framings: int | Sequence[Framing], page: int, seconds: int) -> dict[str, Any]:
    try:
        picture = decoder(seconds).decode(data, framings, page)
    except ImageError as error:
        return _failed(error)
    return {"width": picture.width, "height": picture.height, "image": picture.packed, "peak": picture.peak}


def _failed(error: ImageError) -> dict[str, Any]:
    return {"stage": "decode", "error_type": error.kind, "message": str(error)}


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a manifest row that stay with the image."""
    return {name: row.get(name) for name in ("image_id", "uri", "category", "position")}
