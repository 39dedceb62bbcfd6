"""Data that a stage made: pseudobulk, embeddings, features."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stagesweep.base.errors import UserError
from stagesweep.base.spec import Features, Spec
from stagesweep.base.view import View

Columns = dict[str, NDArray[Any]]


@dataclass
class Made:
    """A data set as any other, held in memory: columns (n, …) of each split, by name.

    The column `id` says what each sample is called, (n,), and is not part of a view.
    """

    spec: Spec
    columns: Mapping[str, Columns]
    label_names: dict[str, list[str]] = field(default_factory=dict)

    def split(self, name: str) -> View:
        """The samples of a split; raises UserError naming the splits there are."""
        if name not in self.columns:
            raise UserError(f"no split {name!r}; there are {', '.join(self.columns)}")
        own = {key: torch.from_numpy(c) for key, c in self.columns[name].items() if key != "id"}
        return View(own)

    def ids(self, split: str) -> NDArray[np.str_]:
        """What each sample of a split is called, (n,)."""
        names: NDArray[np.str_] = self.columns[split]["id"]
        return names

    def arrays(self) -> Columns:
        """All columns, as ``<split>/<column>``."""
        return {f"{split}/{n}": c for split, own in self.columns.items() for n, c in own.items()}

    def about(self) -> dict[str, Any]:
        """All else, as plain values."""
        return {"spec": asdict(self.spec), "label_names": self.label_names}


def restored(arrays: Columns, about: Mapping[str, Any]) -> Made:
    """Data made earlier, from its `arrays` and what is said `about` it."""
    columns: dict[str, Columns] = {}
    for key, array in arrays.items():
        split, _, name = key.partition("/")
        columns.setdefault(split, {})[name] = array
    spec = about["spec"]
    features = {name: _features(given) for name, given in spec["features"].items()}
    made = Spec(features, spec["categories"], spec["labels"])
    return Made(made, columns, about["label_names"])


def _features(given: Mapping[str, Any]) -> Features:
    """As JSON has them: lists where tuples were."""
    tuples = {k: tuple(v) for k, v in given.items() if isinstance(v, Sequence) and k != "unit"}
    return Features(**{**given, **tuples})
