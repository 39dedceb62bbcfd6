"""Reads CSV files and reports errors in them."""

import csv
import zlib
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stagesweep.base.errors import UserError

SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t"}
DECIMALS = ("auto", "point", "comma")
SAMPLE_LINES = 20  # lines of a file by which its separator is recognised
# A comma before three digits is a thousands separator in some countries.
THOUSANDS = r"[+-]?[1-9]\d{0,2}(,\d{3})+"


def read_table(path: str | Path, separator: str = "auto") -> pd.DataFrame:
    """Read a .csv or .csv.gz file with a header line, as text.

    `separator` is comma, semicolon, tab, or auto: the one that divides the header into the most
    columns and the following lines likewise. It is kept in `attrs` of the table. Raises UserError
    naming the file.
    """
    if separator not in ("auto", *SEPARATORS):
        raise UserError(
            f"data.separator={separator!r} must be auto, comma, semicolon or tab, by name"
        )
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no file {file}; give the CSV file to read with data.path=...")
    name = separator
    try:
        name = _separator(file) if separator == "auto" else separator
        # Everything is read as text: "001" may be a name. The column map says what is a number.
        table = pd.read_csv(file, dtype=str, sep=SEPARATORS[name])
    except pd.errors.EmptyDataError:
        table = pd.DataFrame()
    except pd.errors.ParserError as error:
        reason = " ".join(str(error).removeprefix("Error tokenizing data. C error: ").split())
        raise UserError(
            f"{file} is not a readable CSV file: {reason}, read with the separator {name}; fix "
            "that line, or set data.separator to comma, semicolon or tab"
        ) from error
    except (ValueError, OSError, EOFError, zlib.error, csv.Error) as error:
        raise UserError(f"{file} is not a readable CSV file: {error}") from error
    if table.empty:
        raise UserError(f"{file} holds no rows")
    if not isinstance(table.index, pd.RangeIndex):
        # pandas takes the first columns as an index where all lines are longer than the header.
        raise UserError(
            f"{file} has more values in a line than names in its header, read with the separator "
            f"{name}; fix it, or set data.separator to comma, semicolon or tab"
        )
    table.attrs["separator"] = name
    return table


def _separator(file: Path) -> str:
    """Return the name of the separator that fits the first lines of a file best."""
    raw = pd.read_csv(
        file,
        sep="\x1f",
        header=None,
        names=["line"],
        usecols=[0],
        index_col=False,
        dtype=str,
        nrows=SAMPLE_LINES,
        quoting=csv.QUOTE_NONE,
        keep_default_na=False,
    )
    lines = raw["line"].tolist()

    if not lines:
        raise pd.errors.EmptyDataError

    def fit(name: str) -> tuple[bool, float, int]:
        header, *rows = (len(row) for row in csv.reader(lines, delimiter=SEPARATORS[name]))
        alike = sum(width == header for width in rows) / max(len(rows), 1)
        return header > 1, alike, header

    return max(SEPARATORS, key=fit)


def require_columns(table: pd.DataFrame, columns: Iterable[str], source: str) -> None:
    """Raise UserError for a missing column, naming the nearest one that exists."""
    for column in columns:
        if column not in table:
            nearest = get_close_matches(column, [str(name) for name in table], n=1, cutoff=0)
            hint = f"; the nearest is {nearest[0]!r}" if nearest else ""
            raise UserError(f"no column {column!r} in {source}{hint} (map it in data.columns)")


def numeric_columns(
    table: pd.DataFrame, columns: Sequence[str], source: str, decimal: str = "auto"
) -> NDArray[np.float64]:
    """Return the columns as numbers (n, w), NaN where empty; raises UserError for other text.

    `decimal` is point, comma, or auto: a comma if the columns of the table are separated by
    something else, and its numbers have commas and no points.
    """
    if decimal not in DECIMALS:
        raise UserError(f"data.decimal={decimal!r} must be auto, point or comma, by name")
    commas = decimal == "comma" or (
        decimal == "auto" and _has_decimal_commas(table, columns, source)
    )
    parsed = {}
    for column in columns:
        text = table[column]
        if commas and not pd.api.types.is_numeric_dtype(text):
            # A point is not part of such a number: "1.234,5" and "1.5" are refused.
            plain = text.astype("string").str.replace(".", "?", regex=False)
            text = plain.str.replace(",", ".", regex=False)
        parsed[column] = pd.to_numeric(text, errors="coerce").astype(np.float64)
        wrong = np.flatnonzero(parsed[column].isna() & table[column].notna())
        infinite = np.flatnonzero(np.isinf(parsed[column].to_numpy(np.float64)))
        for row in (*wrong[:1], *infinite[:1]):
            value = table[column].iloc[row]
            mark = "point" if commas else "comma"
            other = "." if commas else ","
            hint = f"; set data.decimal={mark} if it is one" if other in str(value) else ""
            raise UserError(
                f"{value!r} is not a number: column {column!r}, line {row + 2} of {source}{hint}"
            )
    values: NDArray[np.float64] = pd.DataFrame(parsed, index=table.index).to_numpy(np.float64)
    return values


def _has_decimal_commas(table: pd.DataFrame, columns: Sequence[str], source: str) -> bool:
    """Whether a comma is the decimal mark of the columns; raises UserError if it may be either."""
    if table.attrs.get("separator", "comma") == "comma" or not columns:
        return False
    text = pd.concat([table[column] for column in columns]).dropna().astype(str).str.strip()
    if text.str.fullmatch(r"[+-]?\d*\.\d+(e[+-]?\d+)?", case=False).any():
        return False
    with_commas = text[text.str.fullmatch(r"[+-]?[\d,]*,\d+(e[+-]?\d+)?", case=False)]
    if len(with_commas) and with_commas.str.fullmatch(THOUSANDS).all():
        raise UserError(
            f"{with_commas.iloc[0]!r} in {source} can have a decimal comma or a thousands "
            "separator; set data.decimal=comma if it is decimal, else take the commas out"
        )
    return bool(len(with_commas))
