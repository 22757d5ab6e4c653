"""Lists of URIs, in text, CSV or Parquet files."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Storage, clear_errors
from glad_core.errors import GladError
from pipelines.archive.rows import COMMENTS, HEADERS, LeftOut

LIST_SUFFIXES = (".txt", ".lst", ".csv", ".tsv", ".parquet")
READ_AHEAD = 2**20  # bytes
BLANKS_AFTER_QUOTE = re.compile(r'" +(?=[,;\t\r\n]|$)')
URI, CATEGORY = "uri", "category"  # columns, in any case

Listing = tuple[str, str | None]  # a URI, and its category if the list says one
CsvRow = tuple[int, dict[str, str]]  # number of its first line, from 1; its cells by column


def read_list(source: str, storage: Storage, left_out: LeftOut) -> Iterator[Listing]:
    """The entries of a list in its order. Bytes that are not UTF-8 are kept.

    Null and empty entries are counted in ``left_out``, and so are lines that begin with # and a text list's header.

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
    begun = False
    with io.BufferedReader(storage.open(source), READ_AHEAD) as stream:
        try:
            for line in io.TextIOWrapper(stream, _encoding(stream.peek(2)), errors="surrogateescape"):
                columns = [] if begun else _columns(line)
                if URI in columns and len(columns) > 1:  # a CSV file by another name
                    left_out.others[COMMENTS] = 0
                    yield from _csv(source, storage, left_out)
                    return
                if URI in columns:
                    begun = True
                    left_out.others[HEADERS] += 1
                elif line.lstrip().startswith("#"):
                    left_out.others[COMMENTS] += 1
                elif line.strip():
                    begun = True
                    yield line.strip(), None
        except UnicodeError as error:
            raise GladError(f"{source}: no text in UTF-8 or UTF-16; write one URI per line") from error


def _encoding(start: bytes) -> str:
    """UTF-8 or UTF-16, by its mark or its first character, which is seldom beyond U+00FF."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "utf-16-le" if start[1:2] == b"\0" else "utf-16-be" if start[:1] == b"\0" else "utf-8-sig"


def _delimiter(header: str) -> str:
    return max(",;\t", key=header.count)


def _columns(header: str) -> list[str]:
    """The names of columns in a line, in lower case; it may begin with #."""
    return [name.strip("\"'# \t\r\n").lower() for name in header.split(_delimiter(header))]


def check_once(columns: Iterable[str], needed: Iterable[str], source: str) -> None:
    """Refuse a file in which a needed column is there twice: either could be meant. Raises GladError."""
    counts = Counter(name.strip().lower() for name in columns)
    for name in needed:
        if counts[name] > 1:
            raise GladError(f"{source}: has the column '{name}' {counts[name]} times; rename the others")


def csv_rows(
    data: bytes, needed: Collection[str], source: str, left_out: LeftOut
) -> tuple[list[str], Iterator[CsvRow]]:
    """Columns and rows of a CSV file as programs write it: UTF-8 or UTF-16, commas, semicolons or tabs, blanks around.

    Columns have their names in lower case; a row lacks what its line lacks. Lines that begin with # are comments.
    Excel's first line ``sep=;`` names the separator.

    Args:
        needed: columns that may not be there twice, and whose cells may not go over several lines.

    Raises:
        UnicodeError: neither of the two encodings.
        GladError: a needed column is there twice; while rows are read, a quote is open or a row has too many cells.
    """
    text = data.decode(_encoding(data))
    if excel := re.match(r"sep=(.)(\r\n|\r|\n)", text):
        text = "\n" + text[excel.end() :]
    header = next((line for line in _uncommented(text, LeftOut()) if line.strip()), "")
    delimiter = excel[1] if excel else _delimiter(header)
    lines = csv.reader(_uncommented(text, left_out), delimiter=delimiter, skipinitialspace=True, strict=True)
    rows = _filled(lines, source)
    columns = [name.strip().lstrip("# ").lower() for name in next(rows, (1, []))[1]]
    check_once(columns, needed, source)
    return columns, _by_column(rows, columns, needed, source)


def _uncommented(text: str, left_out: LeftOut) -> Iterator[str]:
    """Lines of a CSV file, empty instead of comments, so that they keep their numbers."""
    for line in io.StringIO(text, newline=""):
        comment = line.startswith("#") and URI not in _columns(line)
        left_out.others[COMMENTS] += comment
        yield "\n" if comment else BLANKS_AFTER_QUOTE.sub('"', line)


def _filled(lines: Any, source: str) -> Iterator[tuple[int, list[str]]]:
    """Numbers of the first lines and cells of all rows that are no empty line."""
    number = 1
    try:
        for cells in lines:
            if cells:
                yield number, cells
            number = lines.line_num + 1
    except csv.Error as error:
        raise GladError(
            f"{source}: line {number}: a quote is open or in the wrong place ({error}); correct it"
        ) from error


def _by_column(
    rows: Iterable[tuple[int, list[str]]], columns: list[str], needed: Collection[str], source: str
) -> Iterator[CsvRow]:
    for number, cells in rows:
        if any(cells[len(columns) :]):
            raise GladError(
                f"{source}: line {number} has {len(cells)} cells for {len(columns)} columns; "
                'put quotes (") around one that holds the separator'
            )
        row = dict(zip(columns, cells, strict=False))
        if any(re.search(r"[\r\n]", row.get(name, "")) for name in needed):
            raise GladError(
                f"{source}: line {number}: a quote is open or in the wrong place (it holds lines); correct it"
            )
        yield number, row


def _csv(source: str, storage: Storage, left_out: LeftOut) -> Iterator[Listing]:
    try:
        columns, rows = csv_rows(storage.read(source), (URI, CATEGORY), source, left_out)
    except UnicodeError as error:
        raise GladError(f"{source}: no CSV file in UTF-8 or UTF-16") from error
    if URI not in columns:
        known = ", ".join(columns) or "nothing"
        raise GladError(f"{source}: a CSV list needs a column 'uri' in its first line; it has {known[:200]}")
    for _, row in rows:
        uri = row.get(URI, "").strip()
        if uri:
            yield uri, row.get(CATEGORY, "").strip() or None
        else:
            left_out.blank += 1


def _parquet(source: str, storage: Storage, left_out: LeftOut) -> Iterator[Listing]:
    try:
        with storage.open(source) as stream:
            table = pq.ParquetFile(stream)
            check_once(table.schema_arrow.names, (URI, CATEGORY), source)
            fields = {field.name.strip().lower(): field for field in table.schema_arrow}
            if URI not in fields or not _is_text(fields[URI].type):
                known = ", ".join(f"{field.name} ({field.type})" for field in table.schema_arrow)
                raise GladError(f"{source}: a Parquet list needs a string column 'uri'; it has {known}")
            names = [fields[URI].name]
            if CATEGORY in fields:
                names.append(fields[CATEGORY].name)
            for batch in table.iter_batches(columns=names):
                columns = [_strings(batch[name], f"{source}: the column '{name}'") for name in names]
                for uri, *category in zip(*columns, strict=True):
                    if uri and not uri.isspace():
                        yield os.fsdecode(uri), os.fsdecode(category[0]) if category and category[0] else None
                    else:
                        left_out.blank += 1
    except pa.ArrowException as error:
        raise GladError(f"{source}: not a readable Parquet file") from error


def _strings(column: pa.Array, place: str) -> list[bytes | None]:
    """Text, or whole numbers: labels, which pandas makes floats if one is missing. Raises GladError for others."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        if pa.types.is_floating(column.type):
            column = column.cast(pa.int64(), safe=True)
        return column.cast(pa.large_binary() if _is_text(column.type) else pa.large_string()).to_pylist()
    except pa.ArrowException as error:
        raise GladError(f"{place} holds no names, but {column.type}; write them as text") from error


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))
