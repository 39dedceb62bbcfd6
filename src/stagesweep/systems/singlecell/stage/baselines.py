"""Stage that fits linear baselines of cell types, for the same table as the model."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from stagesweep.systems.singlecell.normalise import log_normalise

if TYPE_CHECKING:
    from stagesweep.run.context import Context

Array = NDArray[Any]
BATCH_SIZE = 4096


@dataclass
class CellBaselines:
    """Logistic regression on log-normalised counts, and principal components of their z-scores.

    Both are fitted on train; of more than `max_rows` cells a random sample is used. Saves
    ``cell_baselines.npz``: ``logistic/assignment/<split>`` (n, k), probabilities of each `label`,
    and ``pca/mean/<split>`` (n, `components`).
    """

    label: str = "label"
    components: int = 20
    max_rows: int = 20_000

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return the number of cells that the baselines were fitted to."""
        view = run.view("train")
        order = torch.randperm(len(view), generator=torch.Generator().manual_seed(run.seed))
        order = order[: self.max_rows].sort().values
        values, labels = map(np.concatenate, zip(*self.batches(view, order), strict=True))
        known = labels >= 0
        centre, scale = values.mean(0), values.std(0) + 1e-6

        def scaled(x: Array) -> Array:
            """z-scores, clipped at 10 as in scanpy, or strong genes would dominate."""
            clipped: Array = ((x - centre) / scale).clip(-10, 10)
            return clipped

        with threadpool_limits(limits=1), warnings.catch_warnings():
            # After a thousand iterations only the last digits change.
            warnings.simplefilter("ignore", ConvergenceWarning)
            logistic = LogisticRegression(max_iter=1000).fit(values[known], labels[known])
            number = min(self.components, *values.shape)
            pca = PCA(number, random_state=run.seed % 2**31).fit(scaled(values))
            found: dict[str, Array] = {}
            for split in ("train", "val", "test"):
                view = run.view(split)
                parts = [
                    (self.probabilities(run, logistic, x), pca.transform(scaled(x)))
                    for x, _ in self.batches(view, torch.arange(len(view)))
                ]
                assignment, means = map(np.concatenate, zip(*parts, strict=True))
                found |= {f"logistic/assignment/{split}": assignment, f"pca/mean/{split}": means}
        run.save("cell_baselines.npz", found)
        return {"fitted_cells": float(len(values))}

    def batches(self, view: Any, rows: torch.Tensor) -> Iterator[tuple[Array, Array]]:
        """Iterate over log-normalised counts (B, g) and labels (B,) of some cells."""
        for batch in view.gather(rows.split(BATCH_SIZE)):
            values = log_normalise(batch["counts"], batch["library"])
            yield values.cpu().numpy(), batch[self.label].cpu().numpy()

    def probabilities(self, run: "Context", logistic: Any, values: Array) -> Array:
        """Return probabilities (B, k) of all labels, 0 for labels that no training cell had."""
        found = np.zeros((len(values), run.data.spec.labels[self.label]), np.float32)
        found[:, logistic.classes_] = logistic.predict_proba(values)
        return found

    def metric_names(self) -> set[str] | None:
        """Names of the metrics of this stage."""
        return {"fitted_cells"}
