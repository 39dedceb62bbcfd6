"""Raw stress against SciPy distances, also with missing values."""

import numpy as np
import torch
from scipy.spatial.distance import pdist
from sklearn.metrics.pairwise import nan_euclidean_distances

from stagesweep.loss.raw_stress import PARTNERS, RawStress, distances, shrink


def test_stress_is_that_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(7, 3, generator=generator)
    value = torch.randn(7, 5, generator=generator)
    total, weight = RawStress("x", scale=0.5)({"mean": mean}, {"x": value})
    expected = ((pdist(mean) - 0.5 * pdist(value)) ** 2).mean()
    np.testing.assert_allclose(total / weight, expected, rtol=1e-4)


def test_a_large_batch_is_cut_into_blocks() -> None:
    generator = torch.Generator().manual_seed(2)
    size = PARTNERS + 1
    mean, value = (torch.randn(2 * size + 1, w, generator=generator) for w in (3, 5))
    total, weight = RawStress("x")({"mean": mean}, {"x": value})
    assert weight == 2 * size
    parts = [slice(0, size), slice(size, 2 * size)]
    expected = np.mean([((pdist(mean[p]) - pdist(value[p])) ** 2).mean() for p in parts])
    np.testing.assert_allclose(total / weight, expected, rtol=1e-4)


def test_shrinking_is_a_wiener_filter() -> None:
    """A point whose mean square is s keeps the share s / (s + noise^2) of each coordinate."""
    points = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 9.0]])
    seen = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    kept = torch.tensor([[12.5 / 13.5], [0.0], [0.5]])
    torch.testing.assert_close(shrink(points, seen, 1.0), points * kept)
    torch.testing.assert_close(shrink(points, seen, 0.0), points)


def test_missing_values_do_not_count() -> None:
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
    total, _ = RawStress("x")({"mean": mean}, {"x": torch.zeros(4, 2)})
    total.backward()
    assert mean.grad is not None
    assert mean.grad.isfinite().all()
