"""Reads .npz files and reports what is wrong with them."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stagesweep.base.errors import UserError


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read all arrays of a .npz file, never a pickle; UserError names a damaged or foreign file."""
    try:
        # Opened here: numpy leaves a file open that is none of its own.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # zipfile, zlib and numpy raise many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is not a readable .npz file: {reason}") from error
