"""A model and baselines are scored by the same metrics, in one table."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from torch import Tensor, nn

from stagesweep.base.errors import UserError
from stagesweep.metric.classification import Classification
from stagesweep.metric.clustering import LatentKMeans
from stagesweep.run.context import Context
from stagesweep.stage.score import Score
from stagesweep.systems.singlecell.simulate import simulated_cohort

MakeRun = Callable[..., Context]
METRICS = {"types": Classification("label"), "clusters": LatentKMeans("label")}
SPLITS = ("train", "val", "test")


class Wrong(nn.Module):
    """Predicts a wrong type for every third cell, each with probability 0.7."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        predicted = batch["label"].clamp(min=0) + (batch["index"] % 3 == 0)
        shares = 0.1 + 0.6 * nn.functional.one_hot(predicted % 4, 4)
        return {"assignment": shares, "mean": shares}


@pytest.fixture
def run(make_run: MakeRun) -> Context:
    run = make_run()
    run.data = simulated_cohort(donors=16, cells=20, genes=30, types=4)
    run.model = Wrong()
    return run


def artifact(run: Context, name: str) -> pd.DataFrame:
    assert run._entry is not None
    return pd.read_csv(run._entry.path / "artifacts" / name)


def test_scores_of_the_predictions(run: Context) -> None:
    metrics = Score(label="label", metrics=METRICS)(run)
    predicted = artifact(run, "predictions.csv")
    table = artifact(run, "comparison.csv").set_index("split")
    assert table["method"].unique().tolist() == ["model"]
    for split in SPLITS:
        own, n = predicted[predicted["split"] == split], len(run.view(split))
        right = 1 - np.ceil(n / 3) / n
        assert own["id"].tolist() == run.data.ids(split).tolist()
        assert (own["label"] == own["predicted"]).mean() == pytest.approx(right)
        assert (own["confidence"] - 0.7).abs().max() < 1e-6
        assert metrics[f"{split}_accuracy"] == table.loc[split, "accuracy"] == pytest.approx(right)
        assert metrics[f"{split}_ece"] == pytest.approx(abs(right - 0.7), abs=1e-6)
        assert 0 < metrics[f"{split}_ari"] < 1
        assert run.load("embeddings.npz")[f"{split}/mean"].shape == (n, 4)


def test_a_baseline_has_the_scores_of_its_arrays(run: Context) -> None:
    codes = {split: run.view(split)["label"].numpy() for split in SPLITS}
    perfect = {f"oracle/assignment/{split}": np.eye(4)[own] for split, own in codes.items()}
    run.save("others.npz", perfect)
    metrics = Score(label="label", metrics=METRICS, baselines="others.npz")(run)
    assert [metrics[f"{split}_oracle_accuracy"] for split in SPLITS] == [1, 1, 1]
    assert metrics["test_accuracy"] < 0.7
    # Without latent means it has no scores of clusters.
    assert "test_oracle_ari" not in metrics
    table = artifact(run, "comparison.csv")
    assert table["method"].tolist() == ["model"] * 3 + ["oracle"] * 3
    assert table.loc[table["method"] == "oracle", "ari"].isna().all()
    without = Score(label="label", metrics=METRICS, baselines="nobody_left.npz")(run)
    assert without == {name: value for name, value in metrics.items() if "oracle" not in name}


def test_a_cell_without_a_type_is_predicted_but_not_scored(run: Context) -> None:
    rows = run.data._rows["val"]
    run.data._columns["label"][rows[:3]] = -1
    metrics = Score(label="label", metrics=METRICS)(run)
    predicted = artifact(run, "predictions.csv")
    val = predicted[predicted["split"] == "val"].reset_index()
    assert val["label"].isna().to_numpy().nonzero()[0].tolist() == [0, 1, 2]
    assert val["predicted"].notna().all()
    known = val.dropna(subset="label")
    right = (known["label"] == known["predicted"]).mean()
    assert metrics["val_accuracy"] == pytest.approx(right)


def test_tables_of_a_view_have_its_name(run: Context) -> None:
    Score(label="label", metrics=METRICS)(run)
    cells = artifact(run, "comparison.csv")
    clusters = {"clusters": METRICS["clusters"]}
    Score(label="label", metrics=clusters, view="mixed")(run)
    assert artifact(run, "comparison.csv").equals(cells)
    assert list(artifact(run, "mixed_comparison.csv")) == ["method", "split", "n", "ari", "nmi"]
    assert len(artifact(run, "mixed_predictions.csv")) == cells["n"].sum()
    assert run.has("mixed_embeddings.npz")


def test_an_unknown_label(run: Context) -> None:
    with pytest.raises(UserError, match=r"stage.it.label=kind.*no such label; choose from: label"):
        Score(label="kind", metrics=METRICS)(run)
