"""The simulated cohort: seed, labels, and the effect of its parameters."""

import numpy as np
import pytest
import torch

from stagesweep.base.errors import UserError
from stagesweep.systems.singlecell.data.dataset import SPLITS, SingleCell
from stagesweep.systems.singlecell.simulate import Cohort, simulated_cohort

SMALL = {"donors": 16, "cells": 40, "genes": 60, "types": 4}


def counts(data: SingleCell, split: str = "train") -> torch.Tensor:
    (batch,) = data.split(split).prepare(torch.device("cpu"), 0).batches(10**6)
    return batch["counts"]


def test_the_seed_determines_the_cohort() -> None:
    first, again, other = (counts(simulated_cohort(**SMALL, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_donors_have_one_condition_and_one_split() -> None:
    data = simulated_cohort(**SMALL)
    assert data.spec.labels == {"label": 4, "donor": 16, "condition": 2, "batch": 3}
    seen = [set(data.split(split)["donor"].tolist()) for split in SPLITS]
    assert sum(map(len, seen)) == 16
    table = data.obs.groupby("donor")["condition"].nunique()
    assert (table == 1).all()
    assert data.obs["condition"].value_counts().tolist() == [320, 320]
    assert all(name.startswith("Simulated") for name in data.spec.features["counts"].names)


def test_counts_are_overdispersed_and_have_the_given_depth() -> None:
    cohort = Cohort(4, 500, 50, 1, 1, 300.0, 0.0, 0.0, 0.0, seed=0)
    drawn = cohort.table().counts.toarray()
    assert drawn.sum(1).mean() == pytest.approx(300, rel=0.05)
    mean, variance = drawn.mean(0), drawn.var(0)
    # A negative binomial's variance, with the library's own (log-normal, 0.4) in the mean.
    wanted = mean + mean**2 * (np.exp(0.16) * (1 + 1 / cohort.theta) - 1)
    assert np.median(variance / wanted) == pytest.approx(1, abs=0.1)


def test_types_differ_in_their_genes() -> None:
    means = {}
    for contrast in (0.0, 3.0):
        data = simulated_cohort(**SMALL, contrast=contrast, batch_effect=0.0, effect=0.0)
        (batch,) = data.split("train").prepare(torch.device("cpu"), 0).batches(10**6)
        share = batch["counts"] / batch["library"]
        profiles = [share[batch["label"] == kind].mean(0) for kind in range(4)]
        means[contrast] = torch.stack(profiles).std(0).sum()
    assert means[3.0] > 3 * means[0.0]


def test_invalid_sizes_are_an_error() -> None:
    with pytest.raises(UserError, match="a cohort needs at least 2 donors"):
        simulated_cohort(donors=1)
