"""Points are compared with the full model of an ablation, or with the best."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stagesweep.sweep.report.comparison import Point, compare
from stagesweep.sweep.report.loading import read

Make = Callable[..., Any]

numbers = st.floats(-100, 100)
PAIRS = st.lists(st.tuples(numbers, numbers), min_size=2, max_size=12)


@given(PAIRS)
def test_differences_are_paired(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = zip(*pairs, strict=True)
    trial: Any = None
    one = Point("one", trial, dict(enumerate(ours)))
    # The order is not that of the seeds, and one has a seed that the other lacks.
    other = Point("other", trial, dict(reversed([*enumerate(theirs), (99, 1.0)])))
    found = one.minus(other)
    difference = np.subtract(ours, theirs)
    assert found.mean == pytest.approx(difference.mean(), abs=1e-9)
    wanted = stats.ttest_rel(ours, theirs).confidence_interval(0.95) if np.ptp(difference) else None
    if wanted is not None and difference.std() > 1e-6:
        assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-6)


def test_an_ablation_is_compared_with_the_full_model(make: Make) -> None:
    maker = make()
    maker.trial({"ablation": "a"}, [0.5], repeats=[0.4, 0.6])
    maker.trial({"ablation": "full"}, [0.75], repeats=[0.7, 0.8])
    maker.trial({"ablation": "b"}, [0.8], repeats=[0.7, 0.9])
    found = compare(read(maker.folder))
    assert found is not None
    assert found.ablation
    assert [point.name for point in found.points] == ["full", "b", "a"]
    assert found.points[2].minus(found.baseline).mean == pytest.approx(-0.25)
    maker.study.set_user_attr("baseline", "b")
    found = compare(read(maker.folder))
    assert found is not None
    assert found.baseline.name == "b"


def test_seeds_of_one_setting_are_repeats(make: Make) -> None:
    maker = make()
    for lr, shift in ((0.1, 0.0), (0.2, 0.25)):
        for seed, value in (("0", 0.25), ("1", 0.5)):
            maker.trial({"lr": lr, "seed": seed}, [value + shift])
    found = compare(read(maker.folder))
    assert found is not None
    assert not found.ablation
    assert [point.name for point in found.points] == ["lr=0.2", "lr=0.1"]
    assert found.points[1].minus(found.baseline) == pytest.approx((-0.25, -0.25, -0.25))


def test_without_repeats_nothing_is_compared(make: Make) -> None:
    maker = make()
    maker.trial({"lr": 0.1}, [0.5])
    maker.trial({"lr": 0.2}, [0.6])
    assert compare(read(maker.folder)) is None
