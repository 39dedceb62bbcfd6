import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagesweep.base.errors import UserError
from stagesweep.config import schema
from stagesweep.config.schema import Decay, EarlyStop, Mode, Schedule
from stagesweep.core.stopping import BestValue, MetricTracker

numbers = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), max_size=30)


def test_the_best_so_far() -> None:
    best = BestValue(Mode.max, min_delta=0.5)
    found = [best.update(value) for value in (1, 1.5, 1.6, math.nan, 3)]
    assert found == [True, False, True, False, True]
    assert (best.value, best.since) == (3, 0)


@given(numbers, st.sampled_from(Mode))
def test_the_best_is_the_extreme_of_all_numbers(values: list[float], mode: Mode) -> None:
    best = BestValue(mode)
    for value in values:
        best.update(value)
    known = [value for value in values if not math.isnan(value)]
    assert best.value == ((max if mode is Mode.max else min)(known) if known else None)


def watch() -> MetricTracker:
    settings = schema.Fit(
        best={"val_loss": Mode.min},
        early_stop={"val_loss": EarlyStop(patience=2)},
        schedule=Schedule(decay=Decay.plateau, metric="val_loss", patience=1, factor=0.5),
    )
    return MetricTracker(settings, settings.early_stop, "joint")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(0, 11))
def test_the_state_is_restored(values: list[float], cut: int) -> None:
    def feed(one: MetricTracker, part: list[float]) -> list[object]:
        rows = [{"val_loss": value} for value in part]
        return [(one.update(row), one.should_stop(row), one.lr_scale) for row in rows]

    through, first, second = watch(), watch(), watch()
    expected = feed(through, values)
    found = feed(first, values[:cut])
    second.load_state_dict(first.state_dict())
    assert found + feed(second, values[cut:]) == expected


def test_a_missing_metric_is_named() -> None:
    with pytest.raises(
        UserError, match=r"stage\.joint\.best: no metric 'val_loss'; there are loss"
    ):
        watch().check(["loss"])
