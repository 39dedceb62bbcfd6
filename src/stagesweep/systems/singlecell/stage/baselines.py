"""The stage that fits linear baselines of cell types, for the same table as the model."""

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

from stagesweep.systems.singlecell.normalise import normalised

if TYPE_CHECKING:
    from stagesweep.run.context import Context

Array = NDArray[Any]
BATCH = 4096


@dataclass
class CellBaselines:
    """Logistic regression of log-normalised counts and principal components of their z-scores,
    fitted on train.

    Leaves ``cell_baselines.npz``: ``logistic/assignment/<split>`` (n, k), probabilities of each
    `label`, and ``pca/mean/<split>`` (n, `components`). Of more than `max_rows` training cells a
    random sample is fitted to.
    """

    label: str = "label"
    components: int = 20
    max_rows: int = 20_000

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return how many cells the baselines were fitted to."""
        view = run.view("train")
        order = torch.randperm(len(view), generator=torch.Generator().manual_seed(run.seed))
        order = order[: self.max_rows].sort().values
        values, labels = map(np.concatenate, zip(*self.read(view, order), strict=True))
        known = labels >= 0
        centre, scale = values.mean(0), values.std(0) + 1e-6

        def scaled(x: Array) -> Array:
            """z-scores, cut off at 10 as by scanpy: or else strong genes are all that is seen."""
            cut: Array = ((x - centre) / scale).clip(-10, 10)
            return cut

        with threadpool_limits(limits=1), warnings.catch_warnings():
            # After a thousand steps it changes no more than its last digits.
            warnings.simplefilter("ignore", ConvergenceWarning)
            logistic = LogisticRegression(max_iter=1000).fit(values[known], labels[known])
            number = min(self.components, *values.shape)
            pca = PCA(number, random_state=run.seed % 2**31).fit(scaled(values))
            found: dict[str, Array] = {}
            for split in ("train", "val", "test"):
                view = run.view(split)
                parts = [
                    (self.shares(run, logistic, x), pca.transform(scaled(x)))
                    for x, _ in self.read(view, torch.arange(len(view)))
                ]
                shares, means = map(np.concatenate, zip(*parts, strict=True))
                found |= {f"logistic/assignment/{split}": shares, f"pca/mean/{split}": means}
        run.save("cell_baselines.npz", found)
        return {"fitted_cells": float(len(values))}

    def read(self, view: Any, rows: torch.Tensor) -> Iterator[tuple[Array, Array]]:
        """Log-normalised counts (B, g) and labels (B,) of some cells."""
        for batch in view.gather(rows.split(BATCH)):
            values = normalised(batch["counts"], batch["library"])
            yield values.cpu().numpy(), batch[self.label].cpu().numpy()

    def shares(self, run: "Context", logistic: Any, values: Array) -> Array:
        """Probabilities (B, k) of all labels, 0 of those that no training cell had."""
        shares = np.zeros((len(values), run.data.spec.labels[self.label]), np.float32)
        shares[:, logistic.classes_] = logistic.predict_proba(values)
        return shares

    def metric_names(self) -> set[str] | None:
        """Metrics this stage gives."""
        return {"fitted_cells"}
