"""Baselines of cell types, fitted to log-normalised counts of training cells."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from stagesweep.run.context import Context
from stagesweep.systems.singlecell.simulate import simulated_cohort
from stagesweep.systems.singlecell.stage.baselines import CellBaselines

MakeRun = Callable[..., Context]
Array = np.ndarray[Any, Any]
SPLITS = ("train", "val", "test")


@pytest.fixture
def run(make_run: MakeRun) -> Context:
    run = make_run()
    run.data = simulated_cohort(donors=16, cells=20, genes=50, types=4, contrast=3.0)
    return run


def cells(run: Context, split: str) -> tuple[Array, Array]:
    """Log-normalised counts and labels."""
    (batch,) = run.view(split).batches(10**6)
    counts = batch["counts"].numpy().astype(np.float64)
    return np.log1p(counts / counts.sum(1, keepdims=True) * 1e4), batch["label"].numpy()


def test_they_equal_scikit_learn(run: Context) -> None:
    stage = CellBaselines(components=5)
    metrics = stage(run)
    assert set(metrics) == stage.metric_names()
    x, y = cells(run, "train")
    assert metrics["fitted_cells"] == len(x)
    found = run.load("cell_baselines.npz")
    assert set(found) == {f"{m}/{s}" for m in ("logistic/assignment", "pca/mean") for s in SPLITS}
    expected = LogisticRegression(max_iter=1000).fit(x, y)
    scaled = ((x - x.mean(0)) / x.std(0)).clip(-10, 10)
    centre, variances = scaled.mean(0), np.linalg.eigvalsh(np.cov(scaled.T))[::-1]
    np.testing.assert_allclose(found["pca/mean/train"].var(0, ddof=1), variances[:5], rtol=1e-3)
    for split in SPLITS:
        own, labels = cells(run, split)
        shares, means = found[f"logistic/assignment/{split}"], found[f"pca/mean/{split}"]
        # lbfgs ends within its tolerance, at another point in fp32 than in double precision.
        np.testing.assert_allclose(shares, expected.predict_proba(own), atol=0.02)
        assert (shares.argmax(1) == labels).mean() > 0.8
        # Scaled by the training cells, whatever the split: components keep no more than there is.
        rest = ((own - x.mean(0)) / x.std(0)).clip(-10, 10) - centre
        assert means.shape == (len(own), 5)
        assert ((means**2).sum(1) <= (rest**2).sum(1) * 1.001).all()


def test_a_type_without_training_cells_has_probability_zero(run: Context) -> None:
    labels = run.data._columns["label"]
    train = run.data._rows["train"]
    labels[train[labels[train].numpy() == 2]] = -1
    CellBaselines()(run)
    shares = run.load("cell_baselines.npz")["logistic/assignment/test"]
    assert shares.shape[1] == 4
    assert (shares[:, 2] == 0).all()
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-5)


def test_many_cells_are_sampled(run: Context) -> None:
    assert CellBaselines(max_rows=60)(run)["fitted_cells"] == 60
    first = run.load("cell_baselines.npz")["logistic/assignment/test"]
    CellBaselines(max_rows=60)(run)
    assert (run.load("cell_baselines.npz")["logistic/assignment/test"] == first).all()
    run.seed += 1
    CellBaselines(max_rows=60)(run)
    assert (run.load("cell_baselines.npz")["logistic/assignment/test"] != first).any()
    assert CellBaselines(components=99, max_rows=30)(run)["fitted_cells"] == 30
    assert run.load("cell_baselines.npz")["pca/mean/val"].shape[1] == 30
