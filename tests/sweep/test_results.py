"""Tables over the seeds of a sweep, from folders written by hand, against values worked out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import adjusted_rand_score

from stagesweep.sweep import results


def trials(folders: Sequence[Path]) -> pd.DataFrame:
    """The part of a sweep's table that says where its trials are."""
    return pd.DataFrame({"state": "complete", "dir": [str(folder) for folder in folders]})


@pytest.fixture
def seeds(tmp_path: Path) -> tuple[pd.DataFrame, np.ndarray]:
    """Four seeds that compared two methods on two splits, and the accuracies of the model."""
    accuracies = np.random.default_rng(0).uniform(0.8, 0.9, size=4)
    for seed, accuracy in enumerate(accuracies):
        artifacts = tmp_path / str(seed) / "stages" / "5_evaluate" / "artifacts"
        artifacts.mkdir(parents=True)
        table = pd.DataFrame(
            {
                "method": ["model", "model", "kmeans", "kmeans"],
                "split": ["train", "val", "train", "val"],
                "acc": [accuracy, 0.5, 0.79, 0.7],
                "leakage": [np.nan] * 4,
            }
        )
        table.to_csv(artifacts / "comparison.csv", index=False)
    return trials([tmp_path / str(seed) for seed in range(4)]), accuracies


def test_seeds_become_a_mean_and_an_interval(seeds: tuple[pd.DataFrame, np.ndarray]) -> None:
    found, accuracies = seeds
    table = results.over_seeds(found)
    assert table is not None
    assert list(table["method"]) == ["model", "model", "kmeans", "kmeans"]
    assert list(table["runs"]) == [4] * 4
    error = stats.sem(accuracies)
    low, high = stats.t.interval(0.95, 3, loc=accuracies.mean(), scale=error)
    first = table.iloc[0]
    assert (first["acc"], first["acc_low"], first["acc_high"]) == pytest.approx(
        (accuracies.mean(), low, high)
    )
    text = results.with_intervals(table)
    assert f"{accuracies.mean():.3f} ± {high - accuracies.mean():.3f}" in text
    assert "0.790 ± 0.000" in text
    assert "val" not in text
    assert "leakage" not in text


def test_how_far_seeds_agree(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    fits = generator.integers(3, size=(3, 40))
    for number, fit in enumerate(fits):
        artifacts = tmp_path / str(number) / "stages" / "1_evaluate" / "artifacts"
        artifacts.mkdir(parents=True, exist_ok=True)
        scores = pd.DataFrame({"method": ["model", "kmeans"], "split": "train", "acc": [0.5, 0.4]})
        scores.to_csv(artifacts / "comparison.csv", index=False)
        samples = {"id": range(40), "split": "train", "cluster": fit, "cluster_kmeans": fits[0]}
        pd.DataFrame(samples).to_csv(artifacts / "clusters.csv", index=False)
    table = results.over_seeds(trials([tmp_path / str(number) for number in range(3)]))
    assert table is not None
    pairs = [adjusted_rand_score(fits[a], fits[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    model, kmeans = (row for _, row in table.iterrows())
    assert model["agreement"] == pytest.approx(np.mean(pairs))
    assert (model["agreement_low"], model["agreement_high"]) == (min(pairs), max(pairs))
    assert kmeans["agreement"] == 1
    text = results.with_intervals(table)
    assert f"{np.mean(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})" in text
    # Trials that had other samples cannot be compared.
    pd.DataFrame(samples).iloc[1:].to_csv(artifacts / "clusters.csv", index=False)
    table = results.over_seeds(trials([tmp_path / str(number) for number in range(3)]))
    assert table is not None
    assert "agreement" not in table


def test_one_seed_has_no_interval(seeds: tuple[pd.DataFrame, np.ndarray]) -> None:
    assert results.over_seeds(seeds[0].head(1)) is None
