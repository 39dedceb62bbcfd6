"""Tables of a sweep, from folders written by hand, against values worked out by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats
from sklearn.metrics import adjusted_rand_score

from stagesweep.config import Mode
from stagesweep.sweep import results

LR = "stage.joint.optimizer.lr"


def trial(folder: Path, number: int, overrides: list[str], result: dict[str, Any] | None) -> Path:
    """A trial as Hydra and a run leave it."""
    place = folder / str(number)
    (place / ".hydra").mkdir(parents=True)
    (place / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    if result is not None:
        (place / "result.json").write_text(json.dumps(result))
    return place


def complete(value: float | None, *statuses: str) -> dict[str, Any]:
    return {
        "status": "complete",
        "objective": {"name": "evaluate/nmi", "value": value},
        "seconds": 2.5,
        "stages": [{"name": f"s{n}", "status": status} for n, status in enumerate(statuses)],
    }


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Twelve trials: two of note, one that failed with a result, one without, and eight more."""
    fixed = ["experiment=digits", "~stage.figures"]
    trial(tmp_path, 0, [f"{LR}=0.001", *fixed], complete(0.5, "reused", "ran", "reused"))
    trial(tmp_path, 1, [f"{LR}=1e-05", *fixed], complete(0.75, "ran"))
    failed = {"status": "failed", "reason": "loss is NaN", "objective": {"value": None}}
    trial(tmp_path, 2, [f"{LR}=null", *fixed], failed)
    trial(tmp_path, 3, [f"{LR}=[1,2]", *fixed], None)
    for number in range(4, 12):
        trial(tmp_path, number, [f"{LR}={number}", *fixed], complete(number / 100))
    (tmp_path / "study.db").touch()
    return tmp_path


def test_one_row_for_every_trial(sweep: Path) -> None:
    faults = {sweep / "3": "stage x needs a y"}
    table = results.summarise(sweep, "evaluate/nmi", [LR], faults)
    expected = ["number", "state", "reason", "evaluate/nmi", "seconds", "reused", "dir"]
    assert list(table.columns) == [*expected, LR]
    assert list(table["number"]) == [str(number) for number in range(12)]
    assert list(table["state"][:4]) == ["complete", "complete", "failed", "failed"]
    assert list(table["reason"][2:4]) == ["loss is NaN", "stage x needs a y"]
    assert list(table["reused"][:2]) == [2, 0]
    assert table["dir"][1] == str(sweep / "1")
    assert list(table[LR][:4]) == [0.001, 1e-05, "null", [1, 2]]


@pytest.mark.parametrize(("mode", "best"), [(Mode.max, ["1", "0"]), (Mode.min, ["4", "5"])])
def test_the_best_come_first(sweep: Path, mode: Mode, best: list[str]) -> None:
    table = results.ranked(results.summarise(sweep, "evaluate/nmi", [LR], {}), mode)
    assert len(table) == 10
    assert list(table["number"][:2]) == best


def test_a_trial_without_the_objective_is_last(tmp_path: Path) -> None:
    trial(tmp_path, 0, [], complete(None))
    trial(tmp_path, 1, [], complete(0.1))
    for mode in Mode:
        table = results.ranked(results.summarise(tmp_path, "evaluate/nmi", [], {}), mode)
        assert list(table["number"]) == ["1", "0"]


def test_the_leaderboard_is_short_and_aligned(sweep: Path) -> None:
    table = results.summarise(sweep, "evaluate/nmi", [LR], {})
    lines = results.leaderboard(results.ranked(table, Mode.max), [LR], rows=3).splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["number", "evaluate/nmi", "seconds", "reused", LR]
    assert lines[1].split() == ["1", "0.75", "2.5", "0", "1e-05"]
    assert len({len(line) for line in lines}) == 1


@pytest.fixture
def seeds(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """Four seeds that compared two methods on two splits, and the accuracies of the model."""
    accuracies = np.random.default_rng(0).uniform(0.8, 0.9, size=4)
    for seed, accuracy in enumerate(accuracies):
        place = trial(tmp_path, seed, [f"seed={seed}"], complete(accuracy, "ran"))
        artifacts = place / "stages" / "5_evaluate" / "artifacts"
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
    return tmp_path, accuracies


def test_seeds_become_a_mean_and_an_interval(seeds: tuple[Path, np.ndarray]) -> None:
    folder, accuracies = seeds
    table = results.over_seeds(results.summarise(folder, "evaluate/nmi", ["seed"], {}))
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
        place = trial(tmp_path, number, [f"seed={number}"], complete(0.5))
        artifacts = place / "stages" / "1_evaluate" / "artifacts"
        artifacts.mkdir(parents=True, exist_ok=True)
        scores = pd.DataFrame({"method": ["model", "kmeans"], "split": "train", "acc": [0.5, 0.4]})
        scores.to_csv(artifacts / "comparison.csv", index=False)
        samples = {"id": range(40), "split": "train", "cluster": fit, "cluster_kmeans": fits[0]}
        pd.DataFrame(samples).to_csv(artifacts / "clusters.csv", index=False)
    table = results.over_seeds(results.summarise(tmp_path, "evaluate/nmi", ["seed"], {}))
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
    table = results.over_seeds(results.summarise(tmp_path, "evaluate/nmi", ["seed"], {}))
    assert table is not None
    assert "agreement" not in table


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    trial(tmp_path, 0, ["seed=0"], complete(0.5))
    assert results.over_seeds(results.summarise(tmp_path, "evaluate/nmi", ["seed"], {})) is None
