import numpy as np
import pytest
import torch
from scipy.special import rel_entr
from torch import Tensor

from stagesweep.loss.deep_embedded_clustering import DeepEmbeddedClustering, target_distribution


def assignments(n: int = 50, k: int = 4, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=g).softmax(1)


def test_target_equals_the_formula() -> None:
    q = assignments().numpy().astype(float)
    expected = np.zeros_like(q)
    frequency = [sum(q[i, j] for i in range(50)) for j in range(4)]
    for i in range(50):
        raised = [q[i, j] ** 2 / frequency[j] for j in range(4)]
        expected[i] = [value / sum(raised) for value in raised]
    np.testing.assert_allclose(target_distribution(assignments()).numpy(), expected, rtol=1e-5)


def test_loss_is_scipys_relative_entropy_of_the_held_target() -> None:
    term, q = DeepEmbeddedClustering(), assignments()
    term.refresh(0, lambda: {"assignment": q})
    now, index = assignments(seed=1)[[3, 1, 40]], torch.tensor([7, 2, 49])
    total, weight = term({"assignment": now}, {"index": index})
    expected = rel_entr(target_distribution(q)[index].numpy(), now.numpy()).sum()
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert weight.item() == 3


def test_positives_are_drawn_to_the_target_of_their_samples() -> None:
    term, q, index = DeepEmbeddedClustering(), assignments(), {"index": torch.arange(50)}
    term.refresh(0, lambda: {"assignment": q})
    views = [assignments(seed=1), assignments(seed=2)]
    both = term({"assignment": views[0], "positive/assignment": views[1]}, index)
    apart = [term({"assignment": view}, index) for view in views]
    for together, first, second in zip(both, *apart, strict=True):
        torch.testing.assert_close(together, first + second)


def test_target_has_no_gradient_and_draws_assignments_to_itself() -> None:
    term = DeepEmbeddedClustering()
    logits = torch.randn(50, 4, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=1.0)
    term.refresh(0, lambda: {"assignment": logits.softmax(1)})
    target = term.target.clone()
    for _ in range(500):
        total, _ = term({"assignment": logits.softmax(1)}, {"index": torch.arange(50)})
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    torch.testing.assert_close(logits.softmax(1), target, rtol=0, atol=1e-2)
    assert not term.target.requires_grad


def test_refreshes_on_schedule_and_reports_the_change_of_labels() -> None:
    term, calls = DeepEmbeddedClustering(every=5), []
    q = torch.eye(4).repeat(25, 1) * 0.9 + 0.025

    def predict() -> dict[str, Tensor]:
        calls.append(None)
        return {"assignment": q}

    rows = [term.refresh(epoch, predict) for epoch in range(6)]
    assert len(calls) == 2
    assert rows == [{}, {}, {}, {}, {}, {"label_change": 0.0}]
    q = q.clone()
    q[:7] = q[:7].roll(1, 1)
    found = term.refresh(10, predict)
    assert found == {"label_change": pytest.approx(0.07)}
    assert tuple(found) == DeepEmbeddedClustering.reports
    assert term.refresh(0, predict) == {}  # another stage begins


def test_state_survives_a_checkpoint() -> None:
    term, other = DeepEmbeddedClustering(every=5), DeepEmbeddedClustering(every=5)
    term.refresh(0, lambda: {"assignment": assignments()})
    other.load_state_dict(term.state_dict())
    batch = {"index": torch.arange(10)}
    outputs = {"assignment": assignments(10, seed=2)}
    assert torch.equal(other(outputs, batch)[0], term(outputs, batch)[0])
    assert other.refresh(3, dict) == {}  # nothing is predicted before it is due
    assert other.refresh(5, lambda: {"assignment": assignments()}) == {"label_change": 0.0}


def test_chunks_add_up() -> None:
    term, q = DeepEmbeddedClustering(), assignments()
    term.refresh(0, lambda: {"assignment": q})
    rows = torch.randperm(50)
    whole = term({"assignment": q[rows]}, {"index": rows})[0]
    parts = [term({"assignment": q[part]}, {"index": part})[0] for part in rows.split(13)]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)
