"""Importances name the parameter that matters."""

from collections.abc import Callable
from typing import Any

import pytest

from stagesweep.sweep.report.importances import importances
from stagesweep.sweep.report.loading import read

Make = Callable[..., Any]


def test_importances_find_the_parameter_that_matters(make: Make) -> None:
    maker = make()
    for number in range(20):
        params = {"matters": 0.01 * 1.5**number, "other": 0.1 + 7 * number % 5}
        maker.trial(params, [float(number)])
    found = importances(read(maker.folder), 0)
    assert isinstance(found, dict)
    assert found["matters"] > 0.8
    assert sum(found.values()) == pytest.approx(1)
