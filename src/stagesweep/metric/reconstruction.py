"""Reconstruction error of each feature."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray


def reconstruction_error(
    predicted: NDArray[np.floating],
    measured: NDArray[np.floating],
    mask: NDArray[np.bool_] | None,
    names: Sequence[str],
) -> pd.DataFrame:
    """Errors of each feature over its observed values, in the unit of the arrays.

    `predicted`, `measured` and `mask` (True = observed; None: all) are (n, w), `names` has length
    w. Returns a row per feature: feature, n, mae, rmse, bias; NaN where nothing was observed.
    """
    error = predicted.astype(np.float64) - measured
    if mask is not None:
        error = np.where(mask, error, np.nan)
    errors = pd.DataFrame(error, columns=list(names))
    table = pd.DataFrame(
        {
            "n": errors.count(),
            "mae": errors.abs().mean(),
            "rmse": (errors**2).mean() ** 0.5,
            "bias": errors.mean(),
        }
    )
    return table.rename_axis("feature").reset_index()
