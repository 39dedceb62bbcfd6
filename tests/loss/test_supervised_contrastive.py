import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from stagesweep.base.errors import UserError
from stagesweep.loss.supervised_contrastive import SupervisedContrastive


def views(n: int, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    names = ("projection", "positive/projection")
    return {name: normalize(torch.randn(n, 5, generator=g), dim=1) for name in names}


def reference(outputs: dict[str, Tensor], labels: list[int], temperature: float) -> float:
    """Khosla et al. 2020, eq. 2, by loops over views."""
    z = np.concatenate([value.numpy().astype(float) for value in outputs.values()])
    n = len(labels)
    total = 0.0
    for i in range(2 * n):
        others = [a for a in range(2 * n) if a != i]
        positives = [
            p
            for p in others
            if p % n == i % n or (labels[i % n] >= 0 and labels[p % n] == labels[i % n])
        ]
        denominator = sum(math.exp(z[i] @ z[a] / temperature) for a in others)
        logs = [math.log(math.exp(z[i] @ z[p] / temperature) / denominator) for p in positives]
        total -= sum(logs) / len(positives)
    return total


@settings(max_examples=25, deadline=None)
@given(
    labels=st.lists(st.integers(-1, 3), min_size=2, max_size=9),
    temperature=st.sampled_from([0.1, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_loops_of_the_paper(labels: list[int], temperature: float, seed: int) -> None:
    outputs = views(len(labels), seed)
    batch = {"index": torch.arange(len(labels)), "gene": torch.tensor(labels)}
    total, weight = SupervisedContrastive(temperature, label="gene")(outputs, batch)
    assert total.item() == pytest.approx(reference(outputs, labels, temperature), rel=1e-4)
    assert weight.item() == 2 * len(labels)
    unlabelled, _ = SupervisedContrastive(temperature)(outputs, batch)
    expected = reference(outputs, [-1] * len(labels), temperature)
    assert unlabelled.item() == pytest.approx(expected, rel=1e-4)


def test_order_of_samples_and_names_of_labels_do_not_matter() -> None:
    outputs, labels = views(8, 0), torch.tensor([0, 0, 1, -1, 2, 1, -1, 0])
    term, order = SupervisedContrastive(label="gene"), torch.randperm(8)
    first, _ = term(outputs, {"index": torch.arange(8), "gene": labels})
    moved = {name: value[order] for name, value in outputs.items()}
    second, _ = term(moved, {"index": order, "gene": (labels * 10)[order].clamp(min=-1)})
    torch.testing.assert_close(first, second)


def test_a_sample_drawn_twice_is_not_a_negative_of_itself() -> None:
    outputs = views(4, 0)
    outputs = {name: value[[0, 1, 2, 3, 0]] for name, value in outputs.items()}
    twice = {"index": torch.tensor([0, 1, 2, 3, 0])}
    labelled = {"index": torch.arange(5), "gene": torch.tensor([7, -1, -1, -1, 7])}
    expected, _ = SupervisedContrastive(label="gene")(outputs, labelled)
    torch.testing.assert_close(SupervisedContrastive()(outputs, twice)[0], expected)


def test_both_sides_have_a_gradient_and_descend() -> None:
    start = {name: value.requires_grad_() for name, value in views(6, 0).items()}
    batch = {"index": torch.arange(6)}
    optimizer = torch.optim.SGD(start.values(), lr=0.1)

    def loss() -> Tensor:
        return SupervisedContrastive()({k: normalize(v, dim=1) for k, v in start.items()}, batch)[0]

    first = loss()
    first.backward()
    for value in start.values():
        assert value.grad is not None
        assert (value.grad.abs().sum(1) > 0).all()
    optimizer.step()
    assert loss() < first


def test_a_missing_label_column_is_named() -> None:
    with pytest.raises(UserError, match=r"loss\.contrastive\.label=gene: the data has no such"):
        SupervisedContrastive(label="gene")(views(3, 0), {"index": torch.arange(3)})
