"""Files that stages save for later stages: arrays, JSON and tables, never a pickle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stagesweep.base.errors import UserError
from stagesweep.base.files import atomic_text, atomic_write
from stagesweep.data.arrays import read_arrays


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
    """Read an artifact as it was given to `write`; UserError when it is damaged."""
    try:
        match path.suffix:
            case ".npz":
                return read_arrays(path)
            case ".json":
                return json.loads(path.read_text())
            case _:
                return pd.read_csv(path)
    except (UserError, OSError, ValueError) as error:
        raise UserError(
            f"{path}, which an earlier stage left, is damaged: {' '.join(str(error).split())}; set "
            "resume=never, or remove what is damaged with stagesweep-store verify --repair"
        ) from error
