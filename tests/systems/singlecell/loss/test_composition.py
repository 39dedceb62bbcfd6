import pytest
import torch
from stagesweep.systems.singlecell.loss.composition import Composition
from torch.distributions import Categorical, kl_divergence


def test_composition_is_a_divergence_and_zero_where_they_agree() -> None:
    true = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    predicted = torch.tensor([[0.1, 0.2, 0.7], [0.2, 0.3, 0.5]])
    total, n = Composition()({"log_proportions": predicted.log()}, {"proportions": true})
    wanted = kl_divergence(Categorical(true[:1].clamp(min=1e-30)), Categorical(predicted[:1]))
    assert total == pytest.approx(float(wanted), abs=1e-6)
    assert n == 2
