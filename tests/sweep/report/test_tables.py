"""The printed tables of a sweep, against values computed by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import adjusted_rand_score

from stagesweep.sweep.report import tables
from stagesweep.sweep.report.loading import read

Make = Callable[..., Any]


def table(folder: Path) -> pd.DataFrame:
    return tables.table(read(folder))


def seeds_of(make: Make, tables: list[dict[str, Any]]) -> Path:
    """A sweep over seeds, each of which left such a table; returns its folder."""
    maker = make()
    for seed, columns in enumerate(tables, 1):
        artifacts = (
            maker.trial({"seed": float(seed)}, [0.5]) / "stages" / "5_evaluate" / "artifacts"
        )
        artifacts.mkdir(parents=True)
        pd.DataFrame(columns).to_csv(artifacts / "comparison.csv", index=False)
    return maker.folder  # type: ignore[no-any-return]


def test_seeds_become_a_mean_and_an_interval(make: Make) -> None:
    accuracies = np.random.default_rng(0).uniform(0.8, 0.9, size=4)
    folder = seeds_of(
        make,
        [
            {
                "method": ["model", "model", "kmeans", "kmeans"],
                "split": ["train", "val", "train", "val"],
                "acc": [accuracy, 0.5, 0.79, 0.7],
                "only_val": [np.nan, 0.25, np.nan, 0.75],
                "only_model": [0.125, 0.125, np.nan, np.nan],
                "leakage": [np.nan] * 4,
            }
            for accuracy in accuracies
        ],
    )
    found = tables.over_seeds(table(folder))
    assert found is not None
    assert list(found["method"]) == ["model", "kmeans"] * 2
    assert list(found["split"]) == ["train", "train", "val", "val"]
    assert list(found["runs"]) == [4] * 4
    error = stats.sem(accuracies)
    low, high = stats.t.interval(0.95, 3, loc=accuracies.mean(), scale=error)
    first = found.iloc[0]
    assert (first["acc"], first["acc_low"], first["acc_high"]) == pytest.approx(
        (accuracies.mean(), low, high)
    )
    head, *lines = (line.split() for line in tables.with_intervals(found).splitlines())
    assert head == [
        "method",
        "split",
        "acc",
        "only_val",
    ]  # the others do not differ between methods
    mean, half = f"{accuracies.mean():.3f}", f"{high - accuracies.mean():.3f}"
    assert lines == [
        ["model", "train", mean, "±", half],
        ["kmeans", "train", "0.790", "±", "0.000"],
        ["model", "val", "0.500", "±", "0.000", "0.250", "±", "0.000"],
        ["kmeans", "val", "0.700", "±", "0.000", "0.750", "±", "0.000"],
    ]


def test_agreement_between_seeds(make: Make) -> None:
    fits = np.random.default_rng(0).integers(3, size=(3, 40))
    scores = {"method": ["model", "kmeans"], "split": "train", "acc": [0.5, 0.4]}
    folder = seeds_of(make, [scores] * 3)
    files = [folder / f"{n}/stages/5_evaluate/artifacts/clusters.csv" for n in range(3)]
    for file, fit in zip(files, fits, strict=True):
        samples = {"id": range(40), "split": "train", "cluster": fit, "cluster_kmeans": fits[0]}
        pd.DataFrame(samples).to_csv(file, index=False)
    found = tables.over_seeds(table(folder))
    assert found is not None
    pairs = [adjusted_rand_score(fits[a], fits[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    model, kmeans = (row for _, row in found.iterrows())
    assert model["agreement"] == pytest.approx(np.mean(pairs))
    assert (model["agreement_low"], model["agreement_high"]) == (min(pairs), max(pairs))
    assert kmeans["agreement"] == 1
    text = tables.with_intervals(found)
    assert f"{np.mean(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})" in text
    # Trials that had other samples cannot be compared.
    pd.DataFrame(samples).iloc[1:].to_csv(files[2], index=False)
    found = tables.over_seeds(table(folder))
    assert found is not None
    assert "agreement" not in found


def test_one_method_alone_shows_all_its_numbers(make: Make) -> None:
    folder = seeds_of(make, [{"method": ["model"], "acc": [0.5], "lost": [np.nan]}] * 2)
    found = tables.over_seeds(table(folder))
    assert found is not None
    head, row = tables.with_intervals(found).splitlines()
    assert head.split() == ["method", "acc"]
    assert row.split() == ["model", "0.500", "±", "0.000"]


def test_one_seed_has_no_interval(make: Make) -> None:
    folder = seeds_of(make, [{"method": ["model"], "acc": [0.5]}])
    assert tables.over_seeds(table(folder)) is None
