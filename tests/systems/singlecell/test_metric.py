"""Concordance and error of proportions, against written-out formulas and known values."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import mean_absolute_error

from stagesweep.systems.singlecell.metric import ProportionScores, concordance_correlation

DRAW = np.random.default_rng(0)


def test_concordance_is_lins() -> None:
    """Pearson's correlation times the penalty for scale and location shift (Lin 1989, eq. 3)."""
    true = DRAW.random(50)
    told = 0.7 * true + 0.2 + DRAW.normal(0, 0.1, 50)
    ratio = true.std() / told.std()
    shift = (true.mean() - told.mean()) ** 2 / (true.std() * told.std())
    wanted = stats.pearsonr(true, told).statistic * 2 / (ratio + 1 / ratio + shift)
    assert concordance_correlation(true, told) == pytest.approx(wanted, rel=1e-9)
    assert concordance_correlation(true, true) == pytest.approx(1)
    assert concordance_correlation(true, -true + 2 * true.mean()) == pytest.approx(-1)


def test_absent_types_are_left_out_and_missing_proportions_are_nan() -> None:
    true = np.column_stack([DRAW.dirichlet(np.ones(3), 20), np.zeros(20)])
    told = np.column_stack([DRAW.dirichlet(np.ones(3), 20), np.full(20, 0.01)])
    found = ProportionScores()({"proportions": told, "input/proportions": true})
    each = [concordance_correlation(true[:, k], told[:, k]) for k in range(3)]
    assert found["ccc_type"] == pytest.approx(np.mean(each))
    assert found["mae"] == pytest.approx(mean_absolute_error(true, told))
    assert np.isnan(ProportionScores()({"input/proportions": true})["ccc"])
    assert np.isnan(concordance_correlation(true[:1, 0], told[:1, 0]))
