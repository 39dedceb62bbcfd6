import logging
from math import isnan
from typing import Any

import numpy as np
import pytest
import torch

from stagesweep.base.errors import UserError
from stagesweep.metric.clustering import ari, davies_bouldin, silhouette
from stagesweep.stage.clustering.baselines import Baselines
from stagesweep.stage.clustering.evaluate import Evaluate, agreement, dimensions

STAGE = Evaluate(column="points", label="blob", enrichment="blob", leakage="site")


def test_metrics_are_those_declared(make_run: Any) -> None:
    for stage in (STAGE, Evaluate(column="points")):
        run = make_run()
        metrics = stage(run)
        assert set(metrics) == stage.metric_names()


def test_separate_clouds_score_one_and_chance_zero(make_run: Any) -> None:
    metrics = STAGE(make_run(n=480))
    for name in ("acc", "nmi", "ari", "purity", "val_nmi", "test_nmi", "stability"):
        assert metrics[name] == 1, name
    assert abs(metrics["leakage_ari"]) < 0.05
    assert metrics["clusters_used"] == 4
    assert metrics["active_units"] == 4
    assert isnan(metrics["baseline_acc"])


def test_reconstruction_is_measured_in_native_units_where_observed(make_run: Any) -> None:
    run = make_run()
    metrics = STAGE(run)
    assert metrics["reconstruction_mae"] == pytest.approx(1, abs=1e-4)
    table = run.load("reconstruction.csv")
    assert list(table.columns) == ["split", "column", "feature", "n", "mae", "rmse", "bias"]
    mask = run.view("test")["points/mask"].numpy()
    assert list(table[table["split"] == "test"]["n"]) == list(mask.sum(axis=0))
    assert table["bias"].to_numpy() == pytest.approx(1, abs=1e-4)


def test_baselines_are_in_the_same_table(make_run: Any) -> None:
    run = make_run()
    Baselines(column="points", methods=["kmeans", "gmm"], stability_seeds=1)(run)
    metrics = STAGE(run)
    table = run.load("comparison.csv").set_index(["method", "split"])
    assert list(table.index.get_level_values("method").unique()) == ["model", "kmeans", "gmm"]
    assert metrics["baseline_nmi"] == table["nmi"].xs("train", level="split").drop("model").max()
    test = run.predict("test", ["mean", "assignment"])
    clusters = test["assignment"].argmax(axis=1)
    row = table.loc["model", "test"]
    assert row["silhouette"] == pytest.approx(silhouette(test["mean"], clusters))
    assert row["davies_bouldin"] == pytest.approx(davies_bouldin(test["mean"], clusters))
    assert row["ari"] == metrics["test_ari"]
    assert isnan(row["stability"])
    samples = run.load("clusters.csv")
    for method in ("kmeans", "gmm"):
        fit = run.load("baselines.npz")[f"{method}/val"][0]
        assert list(samples[samples["split"] == "val"][f"cluster_{method}"]) == list(fit)


def test_every_sample_is_in_the_tables(make_run: Any) -> None:
    run = make_run()
    STAGE(run)
    table = run.load("clusters.csv")
    assert list(table.columns) == ["id", "split", "cluster", "confidence", "blob", "site"]
    assert table["split"].value_counts().to_dict() == {"train": 120, "val": 60, "test": 60}
    assert table["blob"][0] == f"blob {run.view('train')['blob'][0]}"
    assert table["confidence"].between(0.25, 1).all()
    arrays = run.load("embeddings.npz")
    for split in ("train", "val", "test"):
        assert {f"{split}/{n}" for n in ("mean", "logvar", "assignment", "index")} <= set(arrays)
    clusters = table[table["split"] == "val"]["cluster"].to_numpy()
    assert np.array_equal(arrays["val/assignment"].argmax(axis=1), clusters)


def test_profiles_are_means_of_observed_values(make_run: Any) -> None:
    run = make_run()
    STAGE(run)
    table = run.load("profiles.csv").set_index(["cluster", "feature"])
    train = run.view("train")
    cluster = run.predict("train", ["assignment"])["assignment"].argmax(axis=1)
    known = train["points/mask"][:, 1].numpy() & (cluster == 2)
    values = (train["points"][:, 1] * 2 + 50).numpy()[known]
    row = table.loc[2, "x1"]
    assert row["count"] == known.sum()
    assert row["mean"] == pytest.approx(values.mean())
    assert row["std"] == pytest.approx(values.std(ddof=1), rel=1e-5)


def test_enrichment_finds_the_cloud_of_each_cluster(make_run: Any) -> None:
    run = make_run()
    STAGE(run)
    table = run.load("enrichment.csv")
    sure = table[table["q"] < 1e-6]
    assert sorted(sure["cluster"]) == [0, 1, 2, 3]
    assert sorted(sure["label"]) == [f"blob {number}" for number in range(4)]


@pytest.mark.parametrize("known", [0, 1])
def test_a_label_with_one_sample_scores_nan_and_is_logged(
    make_run: Any, caplog: pytest.LogCaptureFixture, known: int
) -> None:
    run = make_run()
    run.data.columns["blob"][130:180] = -1
    run.data.columns["blob"][120 + known : 180] = -1
    with caplog.at_level(logging.WARNING):
        metrics = STAGE(run)
    assert (
        f"it: label 'blob' has {known} known values of {known} kinds in val, too few to score "
        "clusters against; its scores there are NaN"
    ) in caplog.messages
    assert isnan(metrics["val_nmi"])
    assert metrics["nmi"] == 1
    assert run.load("clusters.csv")["blob"][120 + known : 180].isna().all()


def test_posterior_collapse_fails_after_the_files_are_written(make_run: Any) -> None:
    run = make_run(scale=0.001)
    with pytest.raises(
        UserError,
        match=r"it: posterior collapse: 0 latent units are active .* fewer than "
        r"stage.it.min_active_units=2",
    ):
        STAGE(run)
    assert run.has("clusters.csv")
    assert run.has("comparison.csv")


def test_one_cluster_is_a_failed_run(make_run: Any) -> None:
    run = make_run()
    run.model.clusters.set_centres(torch.tensor([[0.0] * 4, [1e3] * 4]))
    with pytest.raises(UserError, match="it: all samples are in one cluster"):
        STAGE(run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"column": "pixels"}, "stage.it.column=pixels, .* choose from: points"),
        ({"column": "points", "label": "gene"}, "stage.it.label=gene, .* choose from: blob, site"),
        ({"column": "points", "leakage": "x"}, "stage.it.leakage=x, but the data has no such"),
    ],
)
def test_unknown_columns_are_errors(make_run: Any, settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Evaluate(**settings)(make_run())


def test_agreement_is_between_the_first_clustering_and_the_others() -> None:
    rng = np.random.default_rng(0)
    fits = list(rng.integers(3, size=(3, 50)))
    expected = (ari(fits[0], fits[1]) + ari(fits[0], fits[2])) / 2
    assert agreement(fits) == pytest.approx(expected)
    assert isnan(agreement(fits[:1]))


def test_effective_dimensions_detect_units_that_vary_together(
    make_run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    assert dimensions(rng.normal(size=(5000, 6))) == pytest.approx(6, abs=0.1)
    line = rng.normal(size=(100, 1)) * np.ones(5)
    assert dimensions(line) == pytest.approx(1)
    assert isnan(dimensions(np.ones((10, 3))))
    run = make_run()
    run.data.columns["points"][:, 1:] = run.data.columns["points"][:, :1]
    with caplog.at_level(logging.WARNING):
        metrics = STAGE(run)
    assert metrics["active_units"] == 4
    assert metrics["latent_dimensions"] == pytest.approx(1, abs=1e-3)
    assert "it: the latent means lie close to a line (1.00 effective dimensions)" in caplog.text
