"""Reconstruction error per feature."""

import numpy as np
import pytest

from stagesweep.metric.reconstruction import reconstruction_error


def test_only_observed_values_count():
    predicted = np.array([[10.0, 20.0, 5.0], [30.0, 40.0, 5.0]])
    measured = np.array([[13.0, 20.0, 0.0], [26.0, 0.0, 0.0]])
    mask = np.array([[True, True, False], [True, False, False]])
    table = reconstruction_error(predicted, measured, mask, ["6kHz", "12kHz", "click"])
    assert table["feature"].tolist() == ["6kHz", "12kHz", "click"]
    assert table["n"].tolist() == [2, 1, 0]
    assert table["mae"].tolist() == pytest.approx([3.5, 0, np.nan], nan_ok=True)
    assert table["rmse"].tolist() == pytest.approx([np.sqrt(12.5), 0, np.nan], nan_ok=True)
    assert table["bias"].tolist() == pytest.approx([0.5, 0, np.nan], nan_ok=True)


def test_without_a_mask_everything_counts():
    zeros = np.zeros((4, 2))
    table = reconstruction_error(zeros + 2, zeros, None, ["a", "b"])
    assert table["n"].tolist() == [4, 4]
    assert table["rmse"].tolist() == [2, 2]
