"""The outcome of a trial follows from its repeats and from the files of its runs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagesweep.run import result
from stagesweep.sweep.study.states import Outcome, check_objective, combine_repeats, read_outcome

NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5)


@given(NUMBERS)
def test_repeats_have_their_mean(values: list[float]) -> None:
    ended = combine_repeats([Outcome("complete", value) for value in values])
    assert ended.state == "complete"
    assert min(values) <= ended.value <= max(values) or len(set(values)) == 1
    assert ended.value == pytest.approx(math.fsum(values) / len(values))


def test_each_of_several_objectives_has_its_mean() -> None:
    ended = combine_repeats([Outcome("complete", [1.0, 10.0]), Outcome("complete", (3.0, 20.0))])
    assert ended == Outcome("complete", [2.0, 15.0])


@pytest.mark.parametrize("bad", ["pruned", "failed"])
def test_a_failed_repeat_fails_the_trial(bad: str) -> None:
    other = Outcome(bad, None, "oom", "too large")
    assert combine_repeats([Outcome("complete", 1.0), other, Outcome("complete", 2.0)]) == other


@pytest.mark.parametrize(
    ("value", "reason", "message"),
    [
        (None, "error", "the run returned None as its objective"),
        ("0.5", "error", "the run returned '0.5' as its objective"),
        ([0.5, None], "error", "the run returned [0.5, None] as its objective"),
        (math.nan, "nan", "its objective is nan"),
        ([0.5, math.nan], "nan", "its objective is [0.5, nan]"),
    ],
)
def test_an_objective_that_is_not_finite_is_a_failure(
    value: Any, reason: str, message: str
) -> None:
    assert check_objective(Outcome("complete", value)) == Outcome("failed", None, reason, message)
    assert combine_repeats([Outcome("complete", 1.0), Outcome("complete", value)]).reason == reason


def test_an_interrupted_run_stays_interrupted() -> None:
    assert check_objective(Outcome("interrupted")) == Outcome("interrupted")


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"status": "complete", "objective": {"value": 0.5}}, Outcome("complete", 0.5)),
        (
            {"status": "complete", "objective": [{"value": 0.5}, {"value": 2}]},
            Outcome("complete", [0.5, 2]),
        ),
        ({"status": "pruned"}, Outcome("pruned")),
        ({"status": "running"}, None),
    ],
)
def test_the_outcome_is_read_from_the_folder(
    tmp_path: Path, result: dict[str, Any], expected: Outcome | None
) -> None:
    assert read_outcome(tmp_path) is None, "not begun"
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert read_outcome(tmp_path) == expected
    (tmp_path / "result.json").write_text(json.dumps(result)[:-3])
    assert read_outcome(tmp_path) is None, "a file that was cut off says nothing"


def test_a_null_objective_is_read_as_nan(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"status": "complete", "objective": {"value": null}}')
    found = read_outcome(tmp_path)
    assert found is not None
    assert math.isnan(found.value)
    assert check_objective(found).reason == "nan"


@pytest.mark.parametrize("value", [math.inf, -math.inf, 0.5])
def test_an_objective_is_read_as_it_was_written(tmp_path: Path, value: float) -> None:
    result.write(tmp_path, {"status": "complete", "objective": {"metric": "a/b", "value": value}})
    assert read_outcome(tmp_path) == Outcome("complete", value)
    several = [{"metric": "a/b", "value": value}, {"metric": "a/c", "value": 1.0}]
    result.write(tmp_path, {"status": "complete", "objective": several})
    assert read_outcome(tmp_path) == Outcome("complete", [value, 1.0])
