"""Figures show the data; figures without data are skipped."""

from typing import Any

import numpy as np
import pandas as pd

from stagesweep.systems.speech.figures import (
    SpeechFigures,
    cluster_map,
    curves,
    error_rates,
    expert_usage,
)


def test_no_data_no_figures(speech_run: Any) -> None:
    assert SpeechFigures()(speech_run()) == {"figures": 0}


def test_figures_show_the_data() -> None:
    random = np.random.default_rng(0)
    table = pd.DataFrame(
        {"cluster": random.integers(3, size=40), "stratum": ["a", "b"] * 20,
         "speaker": [f"s{n % 5}" for n in range(40)]}
    )  # fmt: skip
    figure = cluster_map(random.normal(size=(40, 6)), table, None)
    assert [ax.get_title() for ax in figure.axes] == ["by cluster", "by stratum", "by speaker"]
    rows = pd.DataFrame({"epoch": [1, 2], "train_loss": [2.0, 1.0], "val_loss": [2.5, None]})
    figure = curves("experts", {"experts_0": rows, "experts_1": rows})
    assert len(figure.axes[0].lines) == 4
    usage = pd.DataFrame(
        {"stratum": ["all", "a"], "clips": [9, 9], "expert_0": [0.7, 1.0], "expert_1": [0.3, 0.0]}
    )
    texts = [text.get_text() for text in expert_usage(usage, "test").axes[0].texts]
    assert texts == ["0.70", "0.30", "1.00"]
    rates = pd.DataFrame(
        {"method": ["routed", "none"], "stratum": "all", "wer": [0.1, 0.9],
         "wer_low": [0.05, np.nan], "wer_high": [0.2, np.nan]}
    )  # fmt: skip
    heights = [round(bar.get_height(), 6) for bar in error_rates(rates, "test").axes[0].patches]
    assert heights == [10, 90]
