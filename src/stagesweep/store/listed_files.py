"""The files that a table names, a row each, so that a stage notices when one has changed."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

SEPARATORS = (",", ";", "\t")


def listed_files(table: Path, column: str) -> list[str]:
    """The names in a column of a .csv (.csv.gz) or .jsonl table.

    None where the table or the column cannot be read: the data set says better what is wrong.
    """
    try:
        opened = gzip.open if table.suffix == ".gz" else open
        with opened(table, "rt", encoding="utf-8-sig", newline="") as stream:
            lines = table.suffix in (".json", ".jsonl")
            return list((_objects if lines else _rows)(stream, column))
    except (OSError, EOFError, ValueError, AttributeError, zlib.error, csv.Error):
        return []


def _rows(stream: TextIO, column: str) -> Iterator[str]:
    """The values of a column of a CSV file, whose separator is the one that divides its header."""
    header = stream.readline()
    for separator in SEPARATORS:
        (names,) = csv.reader([header], delimiter=separator)
        if column in names:
            place = names.index(column)
            rows = csv.reader(stream, delimiter=separator)
            yield from (row[place] for row in rows if place < len(row))
            return


def _objects(stream: TextIO, column: str) -> Iterator[str]:
    """The values of a key of the objects in JSON lines."""
    for line in stream:
        if line.strip() and (value := json.loads(line).get(column)) is not None:
            yield str(value)
