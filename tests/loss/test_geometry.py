"""The stress of latent distances, against SciPy's and with values missing."""

import numpy as np
import torch
from scipy.spatial.distance import pdist
from sklearn.metrics.pairwise import nan_euclidean_distances

from stagesweep.loss.geometry import Geometry, distances


def test_stress_is_that_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(7, 3, generator=generator)
    value = torch.randn(7, 5, generator=generator)
    total, weight = Geometry("x", scale=0.5)({"mean": mean}, {"x": value})
    expected = ((pdist(mean) - 0.5 * pdist(value)) ** 2).mean()
    np.testing.assert_allclose(total / weight, expected, rtol=1e-4)


def test_a_missing_value_takes_no_part() -> None:
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(6, 4, generator=generator)
    seen = torch.rand(6, 4, generator=generator) > 0.3
    seen[:, 0] = True
    holes = value.masked_fill(~seen, torch.nan).numpy()
    found = distances(value, seen.float())
    np.testing.assert_allclose(found, nan_euclidean_distances(holes), atol=2e-3)
    changed = distances(torch.where(seen, value, 99.0), seen.float())
    assert torch.equal(found, changed)


def test_equal_samples_have_a_finite_gradient() -> None:
    mean = torch.zeros(4, 3, requires_grad=True)
    total, _ = Geometry("x")({"mean": mean}, {"x": torch.zeros(4, 2)})
    total.backward()
    assert mean.grad is not None
    assert mean.grad.isfinite().all()
