"""Mean and t-interval over seeds."""

from math import isnan, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stagesweep.metric.interval import mean_interval


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=9).filter(lambda v: max(v) - min(v) > 1e-3))
def test_the_interval_equals_that_of_scipy(values):
    interval = mean_interval(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((low, high))
    assert interval.mean == pytest.approx(sum(values) / len(values))


def test_absent_values_are_left_out():
    assert mean_interval([1.0, nan, 3.0]) == mean_interval([1.0, 3.0])
    assert mean_interval([2.0, nan]).mean == 2
    assert isnan(mean_interval([2.0]).low)
    assert isnan(mean_interval([]).mean)
