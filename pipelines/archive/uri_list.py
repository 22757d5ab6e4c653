"""Lists of URIs, in text, CSV or Parquet files."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Storage, clear_errors
from glad_core.errors import GladError
from pipelines.archive.rows import COMMENTS, LeftOut

LIST_SUFFIXES = (".txt", ".lst", ".csv", ".tsv", ".parquet")
UTF16 = ("\udcff\udcfe", "\udcfe\udcff")  # its mark at the start, read as UTF-8
READ_AHEAD = 2**20  # bytes
URI, CATEGORY = "uri", "category"  # columns

Listing = tuple[str, str | None]  # a URI, and its category if the list says one


def read_list(source: str, storage: Storage, left_out: LeftOut) -> Iterator[Listing]:
    """The entries of a list in its order. Bytes that are not UTF-8 are kept.

    Null and empty entries are counted in ``left_out``, and so are the lines of a text file that begin with #.

    Raises:
        GladError: not a list, or damaged. StorageError: it cannot be read.
    """
    kind = source.lower().rpartition(".")[2]
    with clear_errors(source, storage):
        if kind == "parquet":
            yield from _parquet(source, storage, left_out)
        elif kind in ("csv", "tsv"):
            yield from _csv(source, storage, left_out)
        else:
            yield from _lines(source, storage, left_out)


def _lines(source: str, storage: Storage, left_out: LeftOut) -> Iterator[Listing]:
    with io.BufferedReader(storage.open(source), READ_AHEAD) as stream:
        for line in io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape"):
            if line.startswith(UTF16):
                raise GladError(f"{source}: not a UTF-8 text file; write one URI per line")
            if line.lstrip().startswith("#"):
                left_out.others[COMMENTS] += 1
            elif line.strip():
                yield line.strip(), None


def csv_rows(data: bytes) -> csv.DictReader[str]:
    """The rows of a CSV file as programs write it: UTF-8 or UTF-16, commas, semicolons or tabs, blanks around them.

    Columns have their names in lower case. Excel's first line ``sep=;`` names the separator.

    Raises:
        UnicodeDecodeError: neither of the two.
    """
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if utf16 else "utf-8-sig")
    if excel := re.match(r"sep=(.)[\r\n]+", text):
        text = text[excel.end() :]
    header = text.partition("\n")[0]
    delimiter = excel[1] if excel else max(",;\t", key=header.count)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or []]
    return rows


def _csv(source: str, storage: Storage, left_out: LeftOut) -> Iterator[Listing]:
    try:
        rows = csv_rows(storage.read(source))
        if URI not in (rows.fieldnames or []):
            columns = ", ".join(rows.fieldnames or []) or "nothing"
            raise GladError(f"{source}: a CSV list needs a column 'uri' in its first line; it has {columns[:200]}")
        for row in rows:
            uri = (row[URI] or "").strip()
            if uri:
                yield uri, (row.get(CATEGORY) or "").strip() or None
            else:
                left_out.blank += 1
    except (UnicodeDecodeError, csv.Error) as error:
        raise GladError(f"{source}: no CSV file in UTF-8 or UTF-16") from error


def _parquet(source: str, storage: Storage, left_out: LeftOut) -> Iterator[Listing]:
    try:
        with storage.open(source) as stream:
            table = pq.ParquetFile(stream)
            types = {field.name: _text_type(field.type) for field in table.schema_arrow}
            if not types.get(URI):
                known = ", ".join(f"{field.name} ({field.type})" for field in table.schema_arrow)
                raise GladError(f"{source}: a Parquet list needs a string column 'uri'; it has {known}")
            whole = {field.name for field in table.schema_arrow if pa.types.is_integer(field.type)}  # labels as numbers
            names = [URI, *({CATEGORY} & ({name for name, text in types.items() if text} | whole))]
            for batch in table.iter_batches(columns=names):
                columns = [_strings(batch[name]) for name in names]
                for uri, *category in zip(*columns, strict=True):
                    if uri and not uri.isspace():
                        yield os.fsdecode(uri), os.fsdecode(category[0]) if category and category[0] else None
                    else:
                        left_out.blank += 1
    except pa.ArrowException as error:
        raise GladError(f"{source}: not a readable Parquet file") from error


def _strings(column: pa.Array) -> list[bytes | None]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_string() if pa.types.is_integer(column.type) else pa.large_binary()).to_pylist()


def _text_type(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))
