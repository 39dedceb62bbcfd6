import pytest
import torch
from torch.distributions import Normal, kl_divergence

from stagesweep.loss.kl import KL


def outputs(n: int = 30) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "mean": 2 * torch.randn(n, 5, generator=g),
        "logvar": torch.randn(n, 5, generator=g),
    }


def test_closed_form_is_that_of_torch_distributions() -> None:
    given = outputs()
    posterior = Normal(given["mean"], (given["logvar"] / 2).exp())
    expected = kl_divergence(posterior, Normal(torch.zeros(5), torch.ones(5)))
    total, weight = KL()(given, {})
    torch.testing.assert_close(total, expected.sum())
    assert weight.item() == 30
    free, _ = KL(free_bits=0.5)(given, {})
    torch.testing.assert_close(free, expected.clamp(min=0.5).sum())


def test_below_free_bits_there_is_no_gradient() -> None:
    given = {"mean": torch.full((2, 3), 0.1, requires_grad=True), "logvar": torch.zeros(2, 3)}
    total, _ = KL(free_bits=0.1)(given, {})
    total.backward()
    assert given["mean"].grad is not None
    assert not given["mean"].grad.any()
    assert total.item() == pytest.approx(0.6)


def test_chunks_add_up() -> None:
    given, term = outputs(), KL(free_bits=0.2)
    parts = [
        term({k: v[rows] for k, v in given.items()}, {}) for rows in (slice(11), slice(11, 30))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], term(given, {})[0])
