"""Data sets that a stage computes: pseudobulk, embeddings, features."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from stagesweep.base.errors import UserError
from stagesweep.base.spec import Features, Spec
from stagesweep.base.view import View

Columns = dict[str, NDArray[Any]]


@dataclass
class DerivedData:
    """A data set in memory that a stage saves and later stages use in place of the run's data.

    `columns` maps a split to its columns (n, …) by name. The column `id` (n,) holds the names of
    the samples and is not part of a view.
    """

    spec: Spec
    columns: Mapping[str, Columns]
    label_names: dict[str, list[str]] = field(default_factory=dict)

    def split(self, name: str) -> View:
        """Return a split; raises UserError naming the splits that exist."""
        if name not in self.columns:
            raise UserError(f"no split {name!r}; there are {', '.join(self.columns)}")
        own = {key: torch.from_numpy(c) for key, c in self.columns[name].items() if key != "id"}
        return View(own)

    def ids(self, split: str) -> NDArray[np.str_]:
        """Return the names (n,) of the samples of a split."""
        names: NDArray[np.str_] = self.columns[split]["id"]
        return names

    def arrays(self) -> Columns:
        """Return all columns, named ``<split>/<column>``."""
        return {f"{split}/{n}": c for split, own in self.columns.items() for n, c in own.items()}

    def metadata(self) -> dict[str, Any]:
        """Return the spec and the label names as plain values."""
        return {"spec": asdict(self.spec), "label_names": self.label_names}

    @classmethod
    def from_arrays(cls, arrays: Columns, metadata: Mapping[str, Any]) -> Self:
        """Rebuild the data from what `arrays` and `metadata` returned."""
        columns: dict[str, Columns] = {}
        for key, array in arrays.items():
            split, _, name = key.partition("/")
            columns.setdefault(split, {})[name] = array
        spec = metadata["spec"]
        features = {name: _features(values) for name, values in spec["features"].items()}
        return cls(
            Spec(features, spec["categories"], spec["labels"]), columns, metadata["label_names"]
        )


def _features(values: Mapping[str, Any]) -> Features:
    """Features from JSON, which holds lists in place of tuples."""
    tuples = {k: tuple(v) for k, v in values.items() if isinstance(v, Sequence) and k != "unit"}
    return Features(**{**values, **tuples})
