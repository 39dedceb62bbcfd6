"""Cross-validation: the samples of folds and validation splits, and the scores."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from stagesweep.base.errors import UserError
from stagesweep.base.view import View
from stagesweep.config import schema
from stagesweep.metric.classification import Classification
from stagesweep.metric.interval import mean_interval
from stagesweep.run.context import Context
from stagesweep.stage.cross_validate import CrossValidate, vote

MakeRun = Callable[..., Context]


@pytest.fixture
def watched(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> tuple[Context, list[Any]]:
    """A run whose fits only record their views."""
    run, fits = make_run(n=120), []
    columns = run.data.columns
    columns["litter"] = torch.arange(120) // 6
    columns["sick"] = columns["litter"] % 2

    def fit(model: Any, settings: Any, name: str, views: dict[str, View]) -> dict[str, float]:
        fits.append((name, views))
        return {}

    monkeypatch.setattr(run, "fit", fit)
    monkeypatch.setattr(run, "build_model", lambda: run.model)
    return run, fits


def test_a_group_is_in_one_fold_and_not_in_the_validation_split_of_its_model(
    watched: tuple[Context, list[Any]],
) -> None:
    run, fits = watched
    metrics = {"m": Classification("sick")}
    stage = CrossValidate(
        fit=schema.Fit(epochs=1), group="litter", stratify="sick", metrics=metrics
    )
    found = stage(run)
    out = run.load("out_of_fold.npz")
    litter = run.data.columns["litter"].numpy()[out["row"]]
    assert out["row"].tolist() == list(range(120)), "every sample is predicted once"
    assert (pd.Series(out["fold"]).groupby(litter).nunique() == 1).all()
    sick = run.data.columns["sick"].numpy()
    for number, (name, views) in enumerate(fits, 1):
        assert name == f"fold_{number}"
        held = set(litter[out["fold"] == number])
        train, val = (set(views[split]["litter"].tolist()) for split in ("train", "val"))
        assert not train & val
        assert not held & (train | val)
        assert train | val | held == set(range(20))
        assert sick[out["fold"] == number].mean() == pytest.approx(0.5)
    folds = run.load("folds.csv")
    mean, low, high = mean_interval(folds["accuracy"].to_list())
    assert (found["accuracy"], found["accuracy_low"]) == pytest.approx((mean, low))
    assert run.load("cross_validation.csv")["high"][0] == pytest.approx(high)


def test_baselines_train_outside_the_fold_and_share_the_table(
    watched: tuple[Context, list[Any]],
) -> None:
    run, _ = watched
    seen = []

    def oracle(train: Any, test: Any) -> dict[str, np.ndarray]:
        seen.append((len(train["sick"]), len(test["sick"])))
        return {"assignment": np.eye(2)[test["sick"]]}

    stage = CrossValidate(
        fit=schema.Fit(epochs=1), group="litter", folds=4, metrics={"m": Classification("sick")},
        vote="litter", voted={"v": Classification("sick")}, baselines={"oracle": oracle},
    )  # fmt: skip
    found = stage(run)
    assert seen == [(90, 30)] * 4
    assert found["oracle_accuracy"] == found["oracle_voted_auroc"] == 1
    assert set(run.load("folds.csv")["method"]) == {"model", "oracle"}


def test_too_few_groups_are_a_clear_error(watched: tuple[Context, list[Any]]) -> None:
    stage = CrossValidate(
        fit=schema.Fit(epochs=1), group="sick", metrics={"m": Classification("sick")}
    )
    with pytest.raises(UserError, match=r"5 parts need more groups \(sick\) than 2"):
        stage(watched[0])
    stage = CrossValidate(fit=schema.Fit(epochs=1), group="sik", metrics={})
    with pytest.raises(UserError, match="no column 'sik'; there are blob"):
        stage(watched[0])


def test_votes_are_mean_predictions() -> None:
    arrays = {
        "patient": np.array([7, 3, 7, 3]),
        "label": np.array([1, 0, 1, 0]),
        "assignment": np.array([[0.2, 0.8], [1.0, 0.0], [0.6, 0.4], [0.5, 0.5]]),
    }
    found = vote(arrays, "patient")
    np.testing.assert_allclose(found["assignment"], [[0.75, 0.25], [0.4, 0.6]])
    assert found["label"].tolist() == [0, 1]
