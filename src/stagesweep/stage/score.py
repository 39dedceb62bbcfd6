"""The stage that scores a model and baselines in one table, by metrics that a config names."""

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
    from stagesweep.run.context import Run

Arrays = dict[str, NDArray[Any]]
SPLITS = ("train", "val", "test")


@dataclass
class Score:
    """Score probabilities (`assignment`) and latent means (`mean`) of every split.

    `metrics` are called with the arrays of a method: the model's outputs, or those that a stage
    before left in `baselines`, a file of ``<method>/<array>/<split>``; what a method does not give
    is NaN. Leaves ``comparison.csv`` (a row for each method and split), ``embeddings.npz``
    (``<split>/mean``) and ``predictions.csv`` (of each sample its label, what it was told to be,
    and how surely); of a `view`, with its name before theirs.
    """

    label: str
    metrics: Mapping[str, Callable[[Mapping[str, NDArray[Any]]], dict[str, float]]]
    baselines: str | None = None
    part: str | None = None
    view: str | None = None

    def __call__(self, run: "Run") -> dict[str, float]:
        """Return ``<split>_<score>`` of the model, ``<split>_<method>_<score>`` of the others."""
        if self.label not in run.data.spec.labels:
            raise UserError(
                f"stage.{run.stage}.label={self.label}, but the data has no such label; choose "
                f"from: {', '.join(run.data.spec.labels)}"
            )
        names = {"assignment", "mean", self.label} | (metric_inputs(self.metrics.values()) or set())
        parts = {s: run.predict(s, names) for s in SPLITS}
        methods = {"model": parts} | self.others(run, parts)
        rows = []
        for method, splits in methods.items():
            for split, arrays in splits.items():
                scores = [metric(arrays) for metric in self.metrics.values()]
                merged = {name: value for found in scores for name, value in found.items()}
                rows.append(
                    {"method": method, "split": split, "n": len(arrays[self.label])} | merged
                )
        table = pd.DataFrame(rows)
        # Those of the cells stay beside those of data that a stage has made of them.
        prefix = "" if self.view is None else f"{self.view}_"
        run.save(f"{prefix}comparison.csv", table)
        run.save(
            f"{prefix}embeddings.npz", {f"{s}/mean": part["mean"] for s, part in parts.items()}
        )
        told = [self.predictions(run, split, part) for split, part in parts.items()]
        run.save(f"{prefix}predictions.csv", pd.concat(told, ignore_index=True))
        return summary(table)

    def others(self, run: "Run", parts: Mapping[str, Arrays]) -> dict[str, dict[str, Arrays]]:
        """The arrays of each baseline by split, the label among them."""
        found: dict[str, dict[str, Arrays]] = {}
        if self.baselines is not None and run.has(self.baselines):
            for key, array in run.load(self.baselines).items():
                method, name, split = key.split("/")
                arrays = found.setdefault(method, {}).setdefault(split, {})
                arrays |= {name: array, self.label: parts[split][self.label]}
        return found

    def predictions(self, run: "Run", split: str, part: Arrays) -> pd.DataFrame:
        """What each sample of a split was told to be."""
        # The last name is what a code of -1 finds.
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
    """The scores of a table that are numbers, by split, method and name."""
    scores: dict[str, float] = {}
    for row in table.to_dict("records"):
        prefix = row["split"] if row["method"] == "model" else f"{row['split']}_{row['method']}"
        named = {k: v for k, v in row.items() if k not in ("method", "split", "n") and v == v}
        scores |= {f"{prefix}_{name}": float(value) for name, value in named.items()}
    return scores
