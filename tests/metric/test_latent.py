"""Active units."""

import numpy as np

from stagesweep.metric.latent import ActiveUnits, active_units


def test_units_that_vary_are_counted():
    spread = np.array([1.0, 0.2, 0.05, 0.0])
    means = np.random.default_rng(0).normal(size=(5000, 4)) * spread
    assert active_units(means) == 2
    assert active_units(means, threshold=0.001) == 3
    assert ActiveUnits()({"mean": means}) == {"active_units": 2}
