"""The stage that leaves what was kept of the cells and genes of a file."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from stagesweep.run.context import Context


@dataclass
class Preprocess:
    """Leave ``genes.csv`` (in how many training cells, variance, whether it is kept) and
    ``cells.csv`` (id, split, labels by name, total counts).

    The data set filters and chooses genes itself, because sizes of the model follow from it; this
    stage writes down what it did.
    """

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return how many cells of each split, and how many genes, there are."""
        run.save("genes.csv", run.data.gene_table)
        tables = {split: run.data.cell_table(split) for split in ("train", "val", "test")}
        run.save("cells.csv", pd.concat(tables.values(), ignore_index=True))
        counts = {f"{split}_cells": float(len(table)) for split, table in tables.items()}
        return counts | {"genes": float(run.data.gene_table["kept"].sum())}

    def metric_names(self) -> set[str] | None:
        """Metrics this stage gives."""
        return {"train_cells", "val_cells", "test_cells", "genes"}
