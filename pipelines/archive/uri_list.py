"""Lists of URIs, in text or Parquet files."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Storage, clear_errors
from glad_core.errors import GladError

LIST_SUFFIXES = {".txt", ".lst", ".parquet"}
UTF16 = ("\udcff\udcfe", "\udcfe\udcff")  # its mark at the start, read as UTF-8
READ_AHEAD = 2**20  # bytes


def read_list(source: str, storage: Storage) -> Iterator[str | None]:
    """The entries of a list in its order, None for one that is null or empty. Bytes that are not UTF-8 are kept.

    Of a text file, empty lines and those that begin with # are no entries.

    Raises:
        GladError: not a list, or damaged. StorageError: it cannot be read.
    """
    with clear_errors(source, storage):
        yield from (_parquet if source.lower().endswith(".parquet") else _lines)(source, storage)


def _lines(source: str, storage: Storage) -> Iterator[str | None]:
    with io.BufferedReader(storage.open(source), READ_AHEAD) as stream:
        for line in io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape"):
            if line.startswith(UTF16):
                raise GladError(f"{source}: not a UTF-8 text file; write one URI per line")
            if line.strip() and not line.startswith("#"):
                yield line.strip()


def _parquet(source: str, storage: Storage) -> Iterator[str | None]:
    try:
        with storage.open(source) as stream:
            table = pq.ParquetFile(stream)
            types = [_text_type(field.type) for field in table.schema_arrow if field.name == "uri"]
            if types != [True]:
                columns = ", ".join(table.schema_arrow.names)
                raise GladError(f"{source}: a Parquet list needs a string column 'uri'; it has {columns}")
            for batch in table.iter_batches(columns=["uri"]):
                column = batch["uri"]
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                for uri in column.cast(pa.large_binary()).to_pylist():
                    yield os.fsdecode(uri) if uri and not uri.isspace() else None
    except pa.ArrowException as error:
        raise GladError(f"{source}: not a readable Parquet file") from error


def _text_type(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))
