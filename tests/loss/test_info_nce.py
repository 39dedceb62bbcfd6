import pytest
import torch

from stagesweep.loss.info_nce import InfoNCE


def test_samples_of_a_group_are_not_negatives_of_each_other() -> None:
    """Each positive is compared with the samples of other groups only, by loops over pairs."""
    points = torch.nn.functional.normalize(torch.randn(5, 3), dim=1)
    group = torch.tensor([0, 0, 0, 1, 2])
    total, n = InfoNCE("patient", 0.5)({"projection": points}, {"patient": group})
    s = (points @ points.T / 0.5).exp()
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    costs = [-(s[a, b] / (s[a, b] + s[a, 3] + s[a, 4])).log() for a, b in pairs]
    assert total == pytest.approx(float(sum(costs) / 2), rel=1e-5)
    assert n == 3, "a patient's only sample has no positive"
    assert InfoNCE.whole_batch == ("projection",)
