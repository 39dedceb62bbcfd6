import pandas as pd
import pytest
from matplotlib.figure import Figure

from stagesweep.base.spec import Features
from stagesweep.stage.clustering.profiles import cluster_profiles, weighted_mean


def picture(figure: Figure) -> None:
    """Draw it, so that errors at draw time fail the test."""
    figure.canvas.draw()


def texts(figure: Figure) -> str:
    found = [text.get_text() for ax in figure.axes for text in (ax.title, *ax.texts)]
    return "\n".join([figure.get_suptitle(), *found])


def profile_table(names: tuple[str, ...], clusters: int = 3) -> pd.DataFrame:
    rows = [
        {"cluster": c, "feature": name, "count": 10 * (c + 1), "mean": 10.0 * c, "std": 5.0}
        for c in range(clusters)
        for name in names
    ]
    return pd.DataFrame(rows)


def test_inverted_and_isolated_features() -> None:
    names = ("6kHz", "12kHz", "18kHz", "click")
    features = Features(
        names, 0.0, 100.0, ordered=True, unit="dB SPL", isolated=("click",), inverted=True
    )
    figure = cluster_profiles(profile_table(names), "thresholds", features)
    picture(figure)
    ax = figure.axes[0]
    assert ax.get_ylim() == (100, 0)
    assert ax.get_ylabel() == "thresholds (dB SPL)"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == list(names)
    # No line connects the highest frequency and the click.
    assert [len(line.get_xdata()) for line in ax.lines if line.get_linestyle() == "-"][:2] == [3, 3]
    assert "1 (n = 20)" in texts(figure)


def test_images_are_drawn_as_images() -> None:
    names = tuple(f"pixel_{i}" for i in range(6))
    features = Features(names, 0.0, 1.0, grid=(2, 3), unit="intensity")
    figure = cluster_profiles(profile_table(names), "image", features)
    picture(figure)
    assert [ax.images[0].get_array().shape for ax in figure.axes[:3]] == [(2, 3)] * 3  # type: ignore[union-attr]
    assert figure.axes[-1].get_ylabel() == "image (intensity)"


def test_images_without_a_range_share_their_scale() -> None:
    names = ("a", "b", "c", "d")
    figure = cluster_profiles(profile_table(names), "image", Features(names, grid=(2, 2)))
    assert [ax.images[0].get_clim() for ax in figure.axes[:3]] == [(0, 20)] * 3


def test_ordered_features_are_not_inverted_by_default() -> None:
    names = ("500 nm", "600 nm")
    features = Features(names, low=0.0, high=2.0, ordered=True, unit="V")
    figure = cluster_profiles(profile_table(names), "spectrum", features)
    assert figure.axes[0].get_ylabel() == "spectrum (V)"
    assert figure.axes[0].get_ylim() == (0, 2)


def test_features_without_order_range_or_unit_are_drawn_too() -> None:
    names = ("age", "weight")
    figure = cluster_profiles(profile_table(names, clusters=1), "body", Features(names))
    picture(figure)
    assert figure.axes[0].get_ylabel() == "body"


def test_the_mean_of_all_samples_weights_clusters_by_size() -> None:
    mean = weighted_mean(profile_table(("a",), clusters=3))
    assert mean["a"] == pytest.approx((0 * 10 + 10 * 20 + 20 * 30) / 60)
