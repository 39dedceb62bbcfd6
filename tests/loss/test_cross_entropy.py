import pytest
import torch
from torch.distributions import Categorical

from stagesweep.loss.cross_entropy import CrossEntropy


def test_unlabelled_samples_do_not_count() -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    outputs = {"log_assignment": logits.log_softmax(1)}
    label = torch.tensor([0, 1, 2, -1, 1, 0])
    total, weight = CrossEntropy("label")(outputs, {"label": label})
    known = label >= 0
    expected = -Categorical(logits=logits[known]).log_prob(label[known]).sum()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert weight == 5
    nothing = CrossEntropy("label")(outputs, {"label": torch.full((6,), -1)})
    assert [value.item() for value in nothing] == [0, 0]
