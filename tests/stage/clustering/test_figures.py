import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from stagesweep.run.runner import StageResult
from stagesweep.stage.clustering.baselines import Baselines
from stagesweep.stage.clustering.choose_clusters import ChooseClusters
from stagesweep.stage.clustering.evaluate import Evaluate
from stagesweep.stage.clustering.figures import (
    Figures,
    comparison,
    confusion,
    embedding,
    enrichment,
    few_valued,
    k_selection,
)


def picture(figure: Figure) -> None:
    """Draw it, so that errors at draw time fail the test."""
    figure.canvas.draw()


def texts(figure: Figure) -> str:
    found = [text.get_text() for ax in figure.axes for text in (ax.title, *ax.texts)]
    return "\n".join([figure.get_suptitle(), *found])


def history(epochs: int = 5) -> pd.DataFrame:
    epoch = np.arange(1, epochs + 1)
    return pd.DataFrame(
        {"epoch": epoch, "train_loss": 9 / epoch, "val_loss": 10 / epoch, "lr": 0.01 / epoch}
    )


def test_every_figure_with_data_is_drawn(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(names=("6kHz", "12kHz", "18kHz", "click"), low=0.0, high=100.0, ordered=True)
    ChooseClusters(k_range=(3, 5), resamples=3)(run)
    Baselines(column="points", methods=["kmeans"])(run)
    Evaluate(column="points", label="blob", enrichment="blob", leakage="site")(run)
    run.stages.append(StageResult("pretrain", "ran", 1.0, ""))
    monkeypatch.setattr(run, "history", lambda stage: history())
    expected = {
        "training", "k_selection", "embedding", "confusion_blob", "confusion_site", "profiles",
        "enrichment", "comparison",
    }  # fmt: skip
    assert Figures(umap=False, dpi=60)(run) == {"figures": len(expected)}
    paths = list((run._entry.path / "figures").iterdir())
    assert {path.stem for path in paths} == expected
    for path in paths:
        pixels = imread(path)
        assert min(pixels.shape[:2]) > 100, path
        assert pixels.std() > 0.05, path


def test_figures_without_data_are_left_out(make_run: Any) -> None:
    run = make_run()
    assert Figures(umap=False)(run) == {"figures": 0}


class FakeUMAP:
    """Stands in for UMAP, which takes half a minute to compile."""

    def __init__(self, n_neighbors: int, random_state: int, **settings: Any) -> None:
        assert 0 <= random_state < 2**32
        self.near = n_neighbors

    def fit_transform(self, means: Any) -> Any:
        assert self.near < len(means)
        return means[:, :2] * 1000


def test_maps_by_pca_and_umap_for_cluster_and_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=FakeUMAP))
    cluster = np.arange(12) % 3
    means = np.random.default_rng(0).normal(size=(12, 5))
    samples = pd.DataFrame({"cluster": cluster, "site": np.where(cluster == 0, "a", "b")})
    figure = embedding(means, samples, seed=2**40)
    picture(figure)
    assert [ax.get_title() for ax in figure.axes] == ["by cluster"] * 2 + ["by site"] * 2
    assert [ax.get_xlabel()[:4] for ax in figure.axes] == ["PC 1", "UMAP"] * 2
    assert "n = 12" in texts(figure)
    drawn = np.concatenate([c.get_offsets() for c in figure.axes[3].collections])
    assert sorted(drawn[:, 0]) == pytest.approx(sorted(means[:, 0] * 1000))
    assert {text.get_text() for text in figure.axes[1].texts} == {"0", "1", "2"}


def test_a_map_of_many_points_is_of_a_sample() -> None:
    samples = pd.DataFrame({"cluster": np.arange(4000) % 2})
    figure = embedding(np.random.default_rng(0).normal(size=(4000, 3)), samples, seed=None)
    assert "n = 3,000 of 4,000" in texts(figure)
    assert len(figure.axes) == 1


def test_clusters_are_matched_to_labels() -> None:
    labels = pd.Series(["a", "b", "c"] * 10, name="kind")
    figure = confusion(labels, pd.Series([2, 0, 1] * 10))
    picture(figure)
    shown = np.asarray(figure.axes[0].images[0].get_array())
    assert np.array_equal(shown, np.eye(3))
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["2", "0", "1"]


@pytest.mark.parametrize("clusters", [2, 5])
def test_more_or_fewer_clusters_than_labels_can_be_shown(clusters: int) -> None:
    labels = pd.Series(["a", "b", "c"] * 10, name="kind")
    figure = confusion(labels, pd.Series(np.arange(30) % clusters))
    picture(figure)
    assert len(figure.axes[0].get_xticklabels()) == clusters


def test_the_surest_labels_are_in_the_heatmap() -> None:
    rng = np.random.default_rng(0)
    rows = [(c, f"gene{g}", rng.uniform()) for c in range(3) for g in range(50)]
    table = pd.DataFrame(rows, columns=["cluster", "label", "p"]).assign(kind="gene")
    table.loc[table["label"] == "gene7", "p"] = [0.0, 1.0, 1.0]
    table["q"] = (table["p"] * 10).clip(upper=1)
    figure = enrichment(table)
    picture(figure)
    shown = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert len(shown) == 30
    assert shown[0] == "gene7"
    found = (table.groupby("label")["q"].min() < 0.05).sum()
    assert f"Enrichment of gene in clusters: {found} of 50 at q < 0.05" in texts(figure)


def test_the_chosen_k_is_marked() -> None:
    indices = ("stability", "stability_se", "silhouette", "davies_bouldin", "calinski_harabasz")
    table = pd.DataFrame({"k": [3, 4, 5], "inertia": [3.0, 2.0, 1.0]})
    table[[*indices]] = 0.5
    figure = k_selection(table, 4)
    picture(figure)
    assert all(ax.lines[0].get_xdata()[0] == 4 for ax in figure.axes)  # type: ignore[index]
    assert "k = 4" in texts(figure)


@pytest.mark.parametrize("labelled", [True, False])
def test_methods_are_compared_by_external_or_else_internal_scores(labelled: bool) -> None:
    scores = dict.fromkeys(["acc", "nmi", "ari"], 0.8 if labelled else np.nan)
    geometry = {"silhouette": 0.2, "silhouette_input": -0.1, "stability": np.nan}
    rows = [
        {"method": m, "split": "train", "n": 9, **scores, **geometry} for m in ("model", "kmeans")
    ]
    figure = comparison(pd.DataFrame(rows))
    picture(figure)
    titles = [ax.get_title() for ax in figure.axes]
    assert ("accuracy" in titles) == labelled
    assert ("silhouette (latent)" in titles) != labelled


def test_labels_with_a_value_or_with_many_get_no_colours() -> None:
    samples = pd.DataFrame({"id": range(30), "cluster": 0, "gene": range(30), "site": 1, "ok": 2})
    samples.loc[0, "ok"] = 3
    assert few_valued(samples) == ["ok"]
