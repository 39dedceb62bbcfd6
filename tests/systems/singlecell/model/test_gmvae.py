import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from stagesweep.base.spec import Features, Spec
from stagesweep.base.view import Batch
from stagesweep.systems.singlecell.model.gmvae import GMVAE, GaussianMixturePrior, SparseDropout

SPEC = Spec({"counts": Features(tuple("abcdefghijkl"), low=0.0, unit="count")}, labels={"label": 3})


def batch(n: int = 7) -> Batch:
    counts = torch.randint(0, 9, (n, 12), generator=torch.Generator().manual_seed(1)).float()
    return {"counts": counts, "library": counts.sum(1, keepdim=True), "index": torch.arange(n)}


def model(**given: object) -> GMVAE:
    torch.manual_seed(0)
    return GMVAE(SPEC, latent=4, hidden=(16, 8), **given).eval()  # type: ignore[arg-type]


def test_divergence_is_that_of_torch() -> None:
    torch.manual_seed(0)
    components = GaussianMixturePrior(3, 4)
    components.log_scale.data.uniform_(-1, 1)
    mean, logvar = torch.randn(5, 4), torch.randn(5, 4)
    q = Independent(Normal(mean[:, None], (0.5 * logvar).exp()[:, None]), 1)
    p = Independent(Normal(components.centres, components.log_scale.exp()), 1)
    expected = kl_divergence(q, p)
    torch.testing.assert_close(components.divergence(mean, logvar), expected)
    one = MultivariateNormal(mean[0], logvar[0].exp().diag())
    other = MultivariateNormal(components.centres[2], (2 * components.log_scale[2]).exp().diag())
    torch.testing.assert_close(expected[0, 2], kl_divergence(one, other))


def test_the_assignment_maximises_the_bound() -> None:
    """sum_k q_k (D_k + log q_k - log pi_k) is at least -logsumexp(log pi - D), the closed form."""
    out = model()(batch())
    assignment, divergence, prior = out["assignment"], out["divergence"], out["log_prior"]
    torch.testing.assert_close(assignment.sum(1), torch.ones(7))

    def cost(q: torch.Tensor) -> torch.Tensor:
        return (q * (divergence + q.log() - prior)).sum(1)

    torch.testing.assert_close(cost(assignment), -(prior - divergence).logsumexp(1))
    for other in torch.rand(20, 7, 3).add(1e-3):
        assert (cost(other / other.sum(1, keepdim=True)) >= cost(assignment) - 1e-5).all()


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "mse"])
def test_every_cell_is_decoded_once(likelihood: str) -> None:
    made, calls = model(likelihood=likelihood), []
    made.decoder.register_forward_hook(lambda *given: calls.append(given[1][0].shape))
    out = made(batch())
    assert calls == [(7, 4)]
    assert out["scores"].shape == (7, 12)
    assert ("log_theta" in out, "dropout" in out) == (likelihood != "mse", likelihood == "zinb")


def test_a_cell_does_not_depend_on_the_others() -> None:
    made, whole = model(), batch()
    alone = made({name: column[2:3] for name, column in whole.items()})
    for name in ("latent", "scores", "assignment"):
        torch.testing.assert_close(alone[name], made(whole)[name][2:3])


def test_loading_weights_changes_the_number_of_components() -> None:
    first, second = model(components=5), model(components=2)
    second.load_state_dict(first.state_dict())
    assert second.clusters.centres.shape == (5, 4)
    torch.testing.assert_close(second(batch())["assignment"], first(batch())["assignment"])
    first.clusters.set_centres(torch.zeros(2, 4))
    torch.testing.assert_close(first(batch())["assignment"], torch.full((7, 2), 0.5))


def test_sparse_dropout_is_dropout_of_nonzero_values() -> None:
    torch.manual_seed(0)
    x = torch.rand(200, 300) * (torch.rand(200, 300) < 0.2)
    thinned = SparseDropout(0.3)(x)
    there = x > 0
    assert (thinned[~there] == 0).all()
    kept = thinned[there] > 0
    torch.testing.assert_close(thinned[there][kept], x[there][kept] / 0.7)
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.02)
    assert SparseDropout(0.3).eval()(x) is x
    assert torch.equal(SparseDropout(0.0)(x), x)
