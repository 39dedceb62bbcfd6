import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagesweep.loss.alignment import Alignment


@settings(max_examples=25, deadline=None)
@given(labels=st.lists(st.integers(-1, 3), min_size=1, max_size=10), seed=st.integers(0, 1000))
def test_equals_the_mean_over_pairs_by_loops(labels: list[int], seed: int) -> None:
    mean = torch.randn(len(labels), 3, generator=torch.Generator().manual_seed(seed))
    expected, anchors = 0.0, 0
    for i, label in enumerate(labels):
        partners = [j for j, other in enumerate(labels) if other == label >= 0 and j != i]
        if partners:
            distances = [(mean[i] - mean[j]).square().mean().item() for j in partners]
            expected += sum(distances) / len(distances)
            anchors += 1
    batch = {"gene": torch.tensor(labels), "index": torch.arange(len(labels))}
    total, weight = Alignment("gene")({"mean": mean}, batch)
    assert total.item() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert weight.item() == anchors


def test_only_samples_with_partners_have_a_gradient_towards_them() -> None:
    mean = torch.tensor([[0.0], [2.0], [5.0], [9.0]], requires_grad=True)
    batch = {"gene": torch.tensor([1, 1, 2, -1]), "index": torch.arange(4)}
    Alignment("gene")({"mean": mean}, batch)[0].backward()
    assert mean.grad is not None
    assert mean.grad.flatten().tolist() == pytest.approx([-8.0, 8.0, 0.0, 0.0])
