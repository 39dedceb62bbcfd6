"""The exact likelihoods of counts, against scipy, scvi-tools and finite differences."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_expit, log_softmax
from scipy.stats import nbinom
from torch import Tensor

from stagesweep.systems.singlecell import likelihood
from stagesweep.systems.singlecell.likelihood import TABLE_SIZE, negative_binomial_nll

COUNTS = torch.tensor([[0.0, 1, 2, 0, 7, 130], [3, 0, 0, 40, 1, 0]])
SCORES = torch.tensor([[0.1, -0.4, 0.9, -2.0, 1.5, 2.5], [0.6, 0.0, -1.2, 2.2, -0.3, -3.0]])
LOG_THETA = torch.tensor([0.0, 1.0, -1.5, 2.0, 0.5, -0.2])
DROPOUT = torch.tensor([[-2.0, -1.0, 0.5, 2.0, -3.0, 0.0], [0.3, -0.7, 1.1, -2.2, 0.4, 3.0]])

# scvi-tools 1.4.2, ZeroInflatedNegativeBinomial and NegativeBinomial in double precision, of the
# values above with mu = library * softmax(scores): -log_prob(x).sum() and its gradients.
# fmt: off
SCVI_ZINB = 29.338804851892366
SCVI_ZINB_GRADIENTS = [
    [0.2729843, 1.2255142, -0.1186804, 0.0267423, 0.6273713, -2.0339318,
     0.507163, 0.308919, 0.0442772, -1.4944012, 0.626577, 0.0074649],
    [0.2792395, 0.4558264, -0.3770793, -0.2400906, 0.4105182, -0.482412],
    [-0.4114939, 0.2689414, 0.6224593, -0.0645184, 0.0474259, 0.5,
     0.5744425, -0.486589, -0.0649182, 0.0997505, 0.5986877, -0.0064877],
]
SCVI_NB = 28.59700518949169
SCVI_NB_GRADIENTS = [
    [0.6757449, 1.1864397, -0.2620563, 0.7778255, 0.3661234, -2.7440772,
     0.293073, 1.4277803, 0.1582424, -2.554796, 0.5395345, 0.1361658],
    [0.9386944, 1.0244976, -0.2133927, -0.1956029, 0.4105182, -0.4693707],
]
# fmt: on


def library(counts: Tensor) -> Tensor:
    return counts.sum(1, keepdim=True).clamp(min=1)


def reference(scores: Tensor, log_theta: Tensor, dropout: Tensor | None, counts: Tensor) -> float:
    """Scipy's negative binomial with zero inflation."""
    s, theta = scores.double().numpy(), log_theta.double().exp().numpy()
    mean = library(counts).double().numpy() * np.exp(log_softmax(s, axis=1))
    log_p = nbinom.logpmf(counts.double().numpy(), theta, theta / (theta + mean))
    if dropout is not None:
        pi = dropout.double().numpy()
        log_p = log_p + log_expit(-pi)
        log_p = np.where(counts.numpy() == 0, np.logaddexp(np.log(expit(pi)), log_p), log_p)
    return float(-log_p.sum())


@pytest.mark.parametrize("inflated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_equal_scvi(inflated: bool, dtype: torch.dtype) -> None:
    given = [SCORES, LOG_THETA, DROPOUT] if inflated else [SCORES, LOG_THETA]
    leaves = [value.clone().to(dtype).requires_grad_() for value in given]
    counts = COUNTS.to(dtype)
    total = negative_binomial_nll(
        leaves[0], leaves[1], leaves[2] if inflated else None, counts, library(counts)
    )
    total.backward()
    value, gradients = (
        (SCVI_ZINB, SCVI_ZINB_GRADIENTS) if inflated else (SCVI_NB, SCVI_NB_GRADIENTS)
    )
    assert total.item() == pytest.approx(value, rel=1e-5)
    for leaf, wanted in zip(leaves, gradients, strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(leaf.grad.flatten(), wanted, atol=1e-5)


@pytest.mark.parametrize("inflated", [True, False])
def test_the_gradient_passes_gradcheck(inflated: bool) -> None:
    inputs = (SCORES.double().requires_grad_(), LOG_THETA.double().requires_grad_())
    counts = COUNTS.double()
    if inflated:
        inputs = (*inputs, DROPOUT.double().requires_grad_())  # type: ignore[assignment]
    assert torch.autograd.gradcheck(
        lambda scores, theta, pi=None: negative_binomial_nll(
            scores, theta, pi, counts, library(counts)
        ),
        inputs,
    )


def test_chunks_add_up_to_the_sum_over_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "CHUNK_SIZE", 2000)
    genes = 700
    scores = torch.randn(7, genes, dtype=torch.double, requires_grad=True)
    log_theta = torch.randn(genes, dtype=torch.double, requires_grad=True)
    pi = torch.randn(7, genes, dtype=torch.double, requires_grad=True)
    counts = torch.poisson(torch.rand(7, genes) * 2).double()
    size = library(counts)
    leaves = (scores, log_theta, pi)
    whole = negative_binomial_nll(*leaves, counts, size)
    cells = [
        negative_binomial_nll(
            scores[n : n + 1], log_theta, pi[n : n + 1], counts[n : n + 1], size[n : n + 1]
        )
        for n in range(7)
    ]
    together = torch.stack(cells).sum()
    assert whole.item() == pytest.approx(together.item(), rel=1e-12)
    for a, b in zip(
        torch.autograd.grad(whole, leaves), torch.autograd.grad(together, leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_large_and_fractional_counts_beyond_the_table() -> None:
    counts = torch.tensor([[0.0, TABLE_SIZE, TABLE_SIZE + 1, 300.0], [1.5, 0.0, 900.0, 2.0]])
    leaves = [torch.randn(2, 4), torch.randn(4), torch.randn(2, 4)]
    doubles = [leaf.double().requires_grad_() for leaf in leaves]

    def value(*inputs: Tensor) -> Tensor:
        return negative_binomial_nll(*inputs, counts.double(), library(counts).double())

    assert torch.autograd.gradcheck(value, doubles)
    counts[1, 0] = 2
    assert value(*doubles).item() == pytest.approx(reference(*leaves, counts), rel=1e-9)


@settings(max_examples=150, deadline=None)
@example(scores=[0.0] * 3, log_theta=10.0, pi=[0.0] * 3, counts=[0] * 3)
@example(scores=[0.0] * 3, log_theta=11.0, pi=[0.0] * 3, counts=[0, 0, TABLE_SIZE + 1])
@given(
    scores=st.lists(st.floats(-30, 30), min_size=3, max_size=3),
    log_theta=st.floats(-8, 12),
    pi=st.lists(st.floats(-200, 200), min_size=3, max_size=3),
    counts=st.lists(st.integers(0, 20_000), min_size=3, max_size=3),
)
def test_extreme_values_are_finite_and_equal_double_precision(
    scores: list[float], log_theta: float, pi: list[float], counts: list[int]
) -> None:
    inputs = [torch.tensor([scores]), torch.full((3,), log_theta), torch.tensor([pi])]
    seen = torch.tensor([counts], dtype=torch.float32)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [value.clone().to(dtype).requires_grad_() for value in inputs]
        total = negative_binomial_nll(*leaves, seen.to(dtype), library(seen).to(dtype))
        found.append([total, *torch.autograd.grad(total, leaves)])
    scale = 1 + sum(counts) + max(map(abs, pi))
    for single, double in zip(*found, strict=True):
        assert single.isfinite().all()
        difference = (single.double() - double).abs().max().item()
        assert difference < 1e-5 * (scale * (1 + max(0.0, log_theta)) + double.abs().max().item())


def test_the_gradient_scales_with_the_upstream_gradient() -> None:
    leaf = SCORES.clone().requires_grad_()
    total = negative_binomial_nll(leaf, LOG_THETA, DROPOUT, COUNTS, library(COUNTS))
    (once,) = torch.autograd.grad(total, leaf, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * total, leaf)
    torch.testing.assert_close(thrice, 3 * once)
    with torch.no_grad():
        again = negative_binomial_nll(leaf, LOG_THETA, DROPOUT, COUNTS, library(COUNTS))
    assert again.item() == total.item()
