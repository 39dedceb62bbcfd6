"""Reads CSV files and reports what is wrong with them."""

import zlib
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stagesweep.base.errors import UserError


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a .csv or .csv.gz file with a header line; raises UserError naming the file."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no file {file}; give the CSV file to read with data.path=...")
    try:
        # Everything is read as text: "001" may be a name. The column map says what is a number.
        table = pd.read_csv(file, dtype=str)
    except pd.errors.EmptyDataError:
        table = pd.DataFrame()
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} is not a readable CSV file: {error}") from error
    if table.empty:
        raise UserError(f"{file} holds no rows")
    return table


def require_columns(table: pd.DataFrame, columns: Iterable[str], source: str) -> None:
    """Raise UserError for a missing column, naming the nearest one that exists."""
    for column in columns:
        if column not in table:
            nearest = get_close_matches(column, [str(name) for name in table], n=1, cutoff=0)
            hint = f"; the nearest is {nearest[0]!r}" if nearest else ""
            raise UserError(f"no column {column!r} in {source}{hint} (map it in data.columns)")


def numeric_columns(
    table: pd.DataFrame, columns: Iterable[str], source: str
) -> NDArray[np.float64]:
    """Return the columns as numbers (n, w), NaN where empty; raises UserError for other text."""
    parsed = {}
    for column in columns:
        parsed[column] = pd.to_numeric(table[column], errors="coerce")
        wrong = np.flatnonzero(parsed[column].isna() & table[column].notna())
        infinite = np.flatnonzero(np.isinf(parsed[column].to_numpy(np.float64)))
        for row in (*wrong[:1], *infinite[:1]):
            raise UserError(
                f"{table[column].iloc[row]!r} is not a number: "
                f"column {column!r}, line {row + 2} of {source}"
            )
    values: NDArray[np.float64] = pd.DataFrame(parsed, index=table.index).to_numpy(np.float64)
    return values
