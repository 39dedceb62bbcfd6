"""Records of the selected cells and genes, split by split."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from stagesweep.run.context import Context
from stagesweep.systems.singlecell.simulate import simulated_cohort
from stagesweep.systems.singlecell.stage.preprocess import Preprocess

MakeRun = Callable[..., Context]
SPLITS = ("train", "val", "test")


@pytest.fixture
def run(make_run: MakeRun) -> Context:
    run = make_run()
    run.data = simulated_cohort(
        donors=16, cells=30, genes=60, types=3, depth=150.0, min_cells=25, min_genes=25, variable=20
    )
    return run


def artifact(run: Context, name: str) -> pd.DataFrame:
    assert run._entry is not None
    return pd.read_csv(run._entry.path / "artifacts" / name)


def test_the_cell_table_matches_the_splits(run: Context) -> None:
    stage = Preprocess()
    metrics = stage(run)
    assert set(metrics) == stage.metric_names()
    cells = artifact(run, "cells.csv")
    assert cells["id"].is_unique
    assert (cells.groupby("donor")["split"].nunique() == 1).all()
    for split in SPLITS:
        own, view = cells[cells["split"] == split], run.view(split)
        assert metrics[f"{split}_cells"] == len(own) == len(view) > 0
        assert own["id"].tolist() == run.data.ids(split).tolist()
        types = run.data.label_names["label"]
        assert own["label"].tolist() == [types[code] for code in view["label"]]
        (batch,) = view.batches(10**6)
        # Totals are of all genes, those that were left out among them.
        assert (own["total"].to_numpy() > batch["counts"].sum(1).numpy()).all()
    assert len(cells) < 16 * 30, "cells with few genes are left out"


def test_genes_are_counted_in_training_cells(run: Context) -> None:
    assert Preprocess()(run)["genes"] == 20
    genes = artifact(run, "genes.csv")
    assert len(genes) == 60
    kept = genes[genes["kept"]]
    assert tuple(kept["gene"]) == run.data.spec.features["counts"].names
    (train,) = run.view("train").batches(10**6)
    np.testing.assert_array_equal(kept["cells"], (train["counts"] > 0).sum(0))
    found = genes["cells"] >= 25
    assert 20 < found.sum() < 60
    assert (genes["variance"].notna() == found).all()
    left = genes[found & ~genes["kept"]]
    assert left["variance"].max() <= kept["variance"].min()
