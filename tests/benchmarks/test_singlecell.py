"""The benchmark of the GMVAE runs, and its variants compute the same values."""

import pytest
import torch

from stagesweep.systems.singlecell.likelihood import negative_binomial_nll


def test_both_reference_formulas_equal_the_exact_likelihood() -> None:
    from benchmarks.singlecell import stacked, usual

    counts = torch.poisson(torch.rand(5, 7) * 3)
    batch = {"counts": counts, "library": counts.sum(1, keepdim=True).clamp(min=1)}
    scores, log_theta, pi = torch.randn(5, 7), torch.randn(7), torch.randn(5, 7)
    ours = negative_binomial_nll(scores, log_theta, pi, counts, batch["library"])
    assert usual(scores, log_theta, pi, batch).sum().item() == pytest.approx(ours.item(), rel=1e-5)
    theta, mean = log_theta.exp().expand(5, 7), batch["library"] * scores.softmax(1)
    cost = stacked([(pi.sigmoid(), mean, theta)] * 2, counts)
    assert cost.shape == (5, 7, 2)
    assert cost.sum().item() == pytest.approx(2 * ours.item(), rel=1e-5)


def test_the_benchmark_of_steps_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.singlecell import main

    main(["step", "--small"])
    printed = capsys.readouterr().out
    assert "x mse" in printed
    assert "8 decodes" in printed
    assert "as its ancestor" in printed
