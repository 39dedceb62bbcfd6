"""Enrichment against Fisher's exact test and a step-by-step Benjamini-Hochberg."""

import numpy as np
import pytest
from scipy.stats import fisher_exact

from stagesweep.metric.enrichment import COLUMNS, enrichment

NAMES = ["Myo6", "Otoa", "Gjb3", "Rest"]


@pytest.fixture
def cohort():
    generator = np.random.default_rng(0)
    clusters = generator.integers(3, size=200)
    labels = generator.integers(-1, 3, size=200)
    labels[clusters == 1] = np.where(generator.random((clusters == 1).sum()) < 0.9, 0, -1)
    labels[7] = 3
    return clusters, labels


def test_p_is_fishers_one_sided(cohort):
    clusters, labels = cohort
    table = enrichment(clusters, labels, NAMES)
    assert list(table.columns) == COLUMNS
    assert len(table) == 3 * 3
    for row in table.itertuples():
        here, has = clusters == row.cluster, labels == NAMES.index(row.label)
        counts = [
            [(here & has).sum(), (here & ~has).sum()],
            [(~here & has).sum(), (~here & ~has).sum()],
        ]
        assert row.observed == counts[0][0]
        assert row.expected == pytest.approx(here.sum() * has.sum() / 200)
        assert row.p == pytest.approx(fisher_exact(counts, alternative="greater").pvalue)


def test_q_is_benjamini_hochberg(cohort):
    table = enrichment(*cohort, NAMES)
    p, m = np.sort(table["p"]), len(table)
    q = [min(p[j] * m / (j + 1) for j in range(i, m)) for i in range(m)]
    assert table["q"].tolist() == pytest.approx(q)
    assert table.iloc[0][["cluster", "label"]].tolist() == [1, "Myo6"]


def test_rare_labels_are_not_tested(cohort):
    assert "Rest" not in set(enrichment(*cohort, NAMES)["label"])
    assert "Rest" in set(enrichment(*cohort, NAMES, smallest=1)["label"])


def test_no_labels_is_an_empty_table():
    table = enrichment(np.array([0, 1]), np.array([-1, -1]), [])
    assert list(table.columns) == COLUMNS
    assert table.empty
