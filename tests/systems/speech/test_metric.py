"""Error rates equal those of jiwer on the corpus; intervals are over speakers."""

import jiwer
import numpy as np
import pandas as pd
import pytest

from stagesweep.systems.speech import metric

REFERENCES = ["one two three", "four", "five six", "seven eight nine", "one"]
HYPOTHESES = ["one too three", "", "five five six", "seven nine", "one"]


def test_rates_are_those_of_the_corpus() -> None:
    counts = metric.errors(REFERENCES, HYPOTHESES)
    found = metric.rates(counts, np.array(["a", "a", "b", "b", "c"]), seed=0)
    assert found["wer"] == pytest.approx(jiwer.wer(REFERENCES, HYPOTHESES))
    assert found["cer"] == pytest.approx(jiwer.cer(REFERENCES, HYPOTHESES))
    assert found["wer_low"] <= found["wer"] <= found["wer_high"]
    assert counts["words"].tolist() == [3, 1, 2, 3, 1]


def test_the_interval_is_over_speakers() -> None:
    counts = pd.DataFrame(
        {"word_errors": [5, 0] * 50, "words": 10, "character_errors": 0, "characters": 10}
    )
    same = metric.rates(counts, np.repeat(np.arange(50), 2), seed=0)
    apart = metric.rates(counts, np.tile([0, 1], 50), seed=0)
    assert same["wer_low"] == same["wer_high"] == 0.25, "speakers are equal"
    assert (apart["wer_low"], apart["wer_high"]) == (0.0, 0.5), "one speaker has all errors"
    alone = metric.rates(counts, np.zeros(100), seed=0)
    assert np.isnan(alone["wer_low"])


def test_a_table_has_every_method_and_stratum() -> None:
    transcripts = pd.DataFrame(
        {
            "method": ["routed"] * 5 + ["none"] * 5,
            "split": "test",
            "speaker": list("aabbc") * 2,
            "stratum": list("xxyyy") * 2,
            "reference": REFERENCES * 2,
            "hypothesis": HYPOTHESES + [""] * 5,
        }
    )
    table = metric.table(transcripts, 0, 50).set_index(["method", "stratum"])
    assert list(table.index) == [(m, s) for m in ("routed", "none") for s in ("all", "x", "y")]
    assert table.loc[("none", "all"), "wer"] == 1.0
    expected = jiwer.wer(REFERENCES[2:], HYPOTHESES[2:])
    assert table.loc[("routed", "y"), "wer"] == pytest.approx(expected)
    assert table.loc[("routed", "x"), "clips"] == 2


def test_usage_of_experts() -> None:
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.5, 0.5], [0.0, 1.0]])
    expert, stratum = np.array([0, 0, 1, 1]), np.array(["x", "x", "x", "y"])
    usage = metric.expert_usage(probabilities, expert, stratum).set_index("stratum")
    assert usage.loc["all", ["expert_0", "expert_1"]].tolist() == [0.5, 0.5]
    assert usage.loc["all", "entropy"] == pytest.approx(np.log(2))
    assert usage.loc["y", ["expert_0", "expert_1", "entropy", "gate_entropy"]].tolist() == [
        0,
        1,
        0,
        0,
    ]
    assert metric.agreement(np.array([0, 0, 1]), np.array(["a", "a", "b"])) == 1.0
    assert np.isnan(metric.agreement(expert, np.array(["a"] * 4)))
