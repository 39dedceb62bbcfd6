"""The stage that scores a model and baselines by the metrics of its config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stagesweep.base.errors import UserError
from stagesweep.core.predict import metric_inputs
from stagesweep.data.labels import label_names

if TYPE_CHECKING:
    from stagesweep.run.context import Context

Arrays = dict[str, NDArray[Any]]
SPLITS = ("train", "val", "test")


@dataclass
class Score:
    """Score probabilities (`assignment`) and latent means (`mean`) of every split.

    `metrics` are called with the arrays of a method: the outputs of the model, or the arrays
    ``<method>/<array>/<split>`` in the file `baselines` of an earlier stage. Scores that need an
    array that a method does not give are NaN.

    Saves ``comparison.csv`` (a row for each method and split), ``embeddings.npz``
    (``<split>/mean``) and ``predictions.csv`` (label, prediction and confidence of each sample).
    With a `view`, the file names begin with its name.
    """

    label: str
    metrics: Mapping[str, Callable[[Mapping[str, NDArray[Any]]], dict[str, float]]]
    baselines: str | None = None
    part: str | None = None
    view: str | None = None

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return ``<split>_<score>`` of the model and ``<split>_<method>_<score>`` of baselines."""
        if self.label not in run.data.spec.labels:
            raise UserError(
                f"stage.{run.stage}.label={self.label}, but the data has no such label; choose "
                f"from: {', '.join(run.data.spec.labels)}"
            )
        names = {"assignment", "mean", self.label} | (metric_inputs(self.metrics.values()) or set())
        parts = {s: run.predict(s, names) for s in SPLITS}
        methods = {"model": parts} | self.baseline_arrays(run, parts)
        rows = []
        for method, splits in methods.items():
            for split, arrays in splits.items():
                scores = [metric(arrays) for metric in self.metrics.values()]
                merged = {name: value for found in scores for name, value in found.items()}
                rows.append(
                    {"method": method, "split": split, "n": len(arrays[self.label])} | merged
                )
        table = pd.DataFrame(rows)
        # Scores of the run's data and of a view are in separate files.
        prefix = "" if self.view is None else f"{self.view}_"
        run.save(f"{prefix}comparison.csv", table)
        run.save(
            f"{prefix}embeddings.npz", {f"{s}/mean": part["mean"] for s, part in parts.items()}
        )
        predictions = [self.predictions(run, split, part) for split, part in parts.items()]
        run.save(f"{prefix}predictions.csv", pd.concat(predictions, ignore_index=True))
        return summary(table)

    def baseline_arrays(
        self, run: "Context", parts: Mapping[str, Arrays]
    ) -> dict[str, dict[str, Arrays]]:
        """Arrays of each baseline by split, including the label."""
        found: dict[str, dict[str, Arrays]] = {}
        if self.baselines is not None and run.has(self.baselines):
            for key, array in run.load(self.baselines).items():
                method, name, split = key.split("/")
                arrays = found.setdefault(method, {}).setdefault(split, {})
                arrays |= {name: array, self.label: parts[split][self.label]}
        return found

    def predictions(self, run: "Context", split: str, part: Arrays) -> pd.DataFrame:
        """Label, prediction and confidence of each sample of a split."""
        # Index -1, the code of an unknown label, finds the last name: None.
        names = np.array([*label_names(run.data, self.label), None], dtype=object)
        return pd.DataFrame(
            {
                "id": run.data.ids(split),
                "split": split,
                self.label: names[part[self.label]],
                "predicted": names[part["assignment"].argmax(1)],
                "confidence": part["assignment"].max(1),
            }
        )


def summary(table: pd.DataFrame) -> dict[str, float]:
    """Scores of a table that are not NaN, by split, method and name."""
    scores: dict[str, float] = {}
    for row in table.to_dict("records"):
        prefix = row["split"] if row["method"] == "model" else f"{row['split']}_{row['method']}"
        named = {k: v for k, v in row.items() if k not in ("method", "split", "n") and v == v}
        scores |= {f"{prefix}_{name}": float(value) for name, value in named.items()}
    return scores
