"""Files that stages save for later stages: arrays, JSON and tables, never a pickle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stagesweep.base.files import atomic_text, atomic_write


def write(path: Path, value: Any) -> None:
    """Write an artifact; the suffix is the format.

    ``.npz`` takes a dict of arrays, ``.json`` plain data, ``.csv`` a DataFrame. ValueError for any
    other suffix.
    """
    match path.suffix:
        case ".npz":
            atomic_write(path, lambda stream: np.savez_compressed(stream, **value))
        case ".json":
            atomic_text(path, json.dumps(value, indent=1))
        case ".csv":
            atomic_text(path, value.to_csv(index=False))
        case other:
            raise ValueError(f"no artifact format for '{other}'")


def read(path: Path) -> Any:
    """Read an artifact as it was given to `write`."""
    match path.suffix:
        case ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        case ".json":
            return json.loads(path.read_text())
        case _:
            return pd.read_csv(path)
