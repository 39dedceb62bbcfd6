"""KL divergence of proportions, against torch.distributions."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from stagesweep.systems.singlecell.loss.proportion_kl import ProportionKL


def test_it_is_a_kl_divergence_and_zero_for_equal_proportions() -> None:
    true = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    predicted = torch.tensor([[0.1, 0.2, 0.7], [0.2, 0.3, 0.5]])
    total, n = ProportionKL()({"log_proportions": predicted.log()}, {"proportions": true})
    expected = kl_divergence(Categorical(true[:1].clamp(min=1e-30)), Categorical(predicted[:1]))
    assert total == pytest.approx(float(expected), abs=1e-6)
    assert n == 2
