"""The charts of a report."""

from collections.abc import Callable
from typing import Any

from stagesweep.sweep.report import charts
from stagesweep.sweep.report.comparison import compare
from stagesweep.sweep.report.loading import read

Make = Callable[..., Any]


def test_the_forest_plot_marks_clear_differences(make: Make) -> None:
    maker = make()
    maker.trial({"ablation": "full"}, [0.8], repeats=[0.75, 0.8, 0.86])
    maker.trial({"ablation": "a"}, [0.2], repeats=[0.15, 0.21, 0.25])
    maker.trial({"ablation": "b"}, [0.8], repeats=[0.8, 0.75, 0.85])
    found = compare(read(maker.folder))
    assert found is not None
    svg = charts.forest_plot(found, "difference")
    assert "var(--accent)" in svg  # a: its interval has no zero
    assert "var(--muted)" in svg  # b
