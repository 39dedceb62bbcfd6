"""A batch with the columns of an audiogram cohort, and one of small images."""

import pytest
import torch

from stagesweep.base.spec import Features, Spec
from stagesweep.base.view import Batch

FREQUENCIES = ("6 kHz", "12 kHz", "18 kHz", "24 kHz", "30 kHz", "click")


@pytest.fixture
def audiogram() -> Spec:
    return Spec(
        features={
            "thresholds": Features(FREQUENCIES, low=0.0, high=100.0, ordered=True),
            "metadata": Features(("age", "weight")),
            "pca": Features(("pc1", "pc2")),
        },
        categories={
            "sex": 3,
            "zygosity": 4,
            "background": 15,
            "centre": 12,
            "life_stage": 4,
            "strain": 10,
        },
        labels={"gene": 300},
    )


@pytest.fixture
def images() -> Spec:
    names = tuple(f"pixel_{i}" for i in range(30))
    return Spec(features={"image": Features(names, low=0.0, high=1.0, grid=(5, 6))})


@pytest.fixture
def batch(audiogram: Spec) -> Batch:
    """40 animals; about a third of the thresholds are missing, all of the first animal's."""
    g = torch.Generator().manual_seed(0)
    n = 40
    mask = torch.rand(n, 6, generator=g) > 0.3
    mask[0] = False
    columns = {
        "thresholds": torch.randn(n, 6, generator=g).masked_fill(~mask, 0),
        "thresholds/mask": mask,
        "thresholds/shift": 20 + 40 * torch.rand(n, 6, generator=g),
        "thresholds/scale": 5 + 15 * torch.rand(n, 6, generator=g),
        "metadata": torch.randn(n, 2, generator=g),
        "metadata/shift": torch.tensor([16.0, 25.0]).expand(n, 2),
        "metadata/scale": torch.tensor([2.0, 4.0]).expand(n, 2),
        "pca": torch.randn(n, 2, generator=g),
        "gene": torch.randint(-1, 5, (n,), generator=g),
        "index": torch.arange(n),
    }
    for name, count in audiogram.categories.items():
        columns[name] = torch.randint(0, count, (n,), generator=g)
    return columns
