"""Gaussian likelihood with a predicted variance."""

import torch
from torch.distributions import Normal

from stagesweep.loss.beta_nll import BetaNLL


def outputs(n: int = 6, width: int = 4) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    found = {f"x/{k}": torch.randn(n, width, generator=draw) for k in ("predicted", "target")}
    seen = (torch.rand(n, width, generator=draw) > 0.3).float()
    logvar = torch.randn(n, width, generator=draw).requires_grad_()
    return found | {"x/logvar": logvar, "x/observed": seen}


def test_beta_zero_is_the_likelihood_of_observed_values() -> None:
    o = outputs()
    each = -Normal(o["x/predicted"], (0.5 * o["x/logvar"]).exp()).log_prob(o["x/target"])
    constant = 0.5 * torch.tensor(2 * torch.pi).log()
    total, weight = BetaNLL("x", beta=0.0)(o, {})
    torch.testing.assert_close(total, ((each - constant) * o["x/observed"]).sum())
    assert weight == o["x/observed"].sum()
    unseen = {**o, "x/target": o["x/target"] + 9 * (1 - o["x/observed"])}
    torch.testing.assert_close(BetaNLL("x")(unseen, {}), BetaNLL("x")(o, {}))


def test_at_beta_one_the_mean_learns_as_from_a_squared_error() -> None:
    o = outputs()
    mean = o["x/predicted"].requires_grad_()
    BetaNLL("x", beta=1.0)(o, {})[0].backward()
    assert mean.grad is not None
    wanted = (mean - o["x/target"]) * o["x/observed"]
    torch.testing.assert_close(mean.grad, wanted.detach())
