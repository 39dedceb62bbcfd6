"""Stage that records which cells and genes of a file were selected."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from stagesweep.run.context import Context


@dataclass
class Preprocess:
    """Save ``genes.csv`` (number of training cells, variance, kept or not) and ``cells.csv`` (id,
    split, names of labels, total counts).

    The data set itself filters cells and selects genes, because the sizes of the model depend on
    it. This stage records the result.
    """

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return the number of cells of each split and the number of genes."""
        run.save("genes.csv", run.data.gene_table)
        tables = {split: run.data.cell_table(split) for split in ("train", "val", "test")}
        run.save("cells.csv", pd.concat(tables.values(), ignore_index=True))
        counts = {f"{split}_cells": float(len(table)) for split, table in tables.items()}
        return counts | {"genes": float(run.data.gene_table["kept"].sum())}

    def metric_names(self) -> set[str] | None:
        """Names of the metrics of this stage."""
        return {"train_cells", "val_cells", "test_cells", "genes"}
