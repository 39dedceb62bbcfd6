"""Reads tables of clips, as CSV or JSON lines."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from stagesweep.base.errors import UserError
from stagesweep.data.table import read_table


def read_clips(path: str) -> pd.DataFrame:
    """Read a table of clips as text: a .csv file, or a .jsonl file with an object per line."""
    if not path.endswith((".jsonl", ".json")):
        return read_table(path)
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no file {file}; give the table to read with data.path=...")
    try:
        # Not splitlines(): a string may contain other line separators.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a readable text file (UTF-8): {error}") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}, line {number} is not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number} is not a JSON object")
        rows.append({k: None if v is None else str(v) for k, v in row.items()})
    if not rows:
        raise UserError(f"{file} has no rows")
    return pd.DataFrame(rows, dtype="string")
