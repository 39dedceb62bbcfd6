"""KL divergence from the mixture, and cross-entropy, by the outputs of a GMVAE."""

import pytest
import torch
from torch.distributions import Categorical, Normal, kl_divergence

from stagesweep.base.spec import Features, Spec
from stagesweep.loss.cross_entropy import CrossEntropy
from stagesweep.systems.singlecell.loss.mixture_kl import MixtureKL
from stagesweep.systems.singlecell.model.gmvae import GMVAE

COUNTS = torch.poisson(torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) * 4)
BATCH = {
    "counts": COUNTS,
    "library": COUNTS.sum(1, keepdim=True),
    "label": torch.tensor([0, 1, 2, -1, 1, 0]),
}


def outputs() -> dict[str, torch.Tensor]:
    spec = Spec({"counts": Features(tuple("abcde"))}, labels={"label": 3})
    found: dict[str, torch.Tensor] = GMVAE(spec, latent=4, hidden=(8, 6)).eval()(BATCH)
    return found


def test_with_the_optimal_assignment_it_is_the_closed_form() -> None:
    """With the optimal q(k|x) both divergences together are -log sum_k pi_k exp(-KL_k)."""
    given = outputs()
    total, weight = MixtureKL()(given, BATCH)
    best = -(given["log_prior"] - given["divergence"]).logsumexp(1).sum()
    assert total.item() == pytest.approx(best.item(), rel=1e-5)
    assert weight == 6


def test_a_known_label_selects_its_component() -> None:
    given = outputs()
    total, _ = MixtureKL("label")(given, BATCH)
    alone, _ = MixtureKL()({k: v[3:4] if len(v) == 6 else v for k, v in given.items()}, {})
    cost = given["divergence"] - given["log_prior"]
    wanted = alone + sum(cost[n, k] for n, k in enumerate(BATCH["label"].tolist()) if k >= 0)
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_unknown_labels_do_not_count_in_the_cross_entropy() -> None:
    given = outputs()
    total, weight = CrossEntropy("label")(given, BATCH)
    told = Categorical(logits=given["log_assignment"])
    known = BATCH["label"] >= 0
    wanted = -told.log_prob(BATCH["label"].clamp(min=0))[known].sum()
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert weight == 5
    none = BATCH | {"label": torch.full((6,), -1)}
    assert [value.item() for value in CrossEntropy("label")(given, none)] == [0, 0]


def test_the_divergence_of_the_model_is_that_of_gaussians() -> None:
    spec = Spec({"counts": Features(tuple("abcde"))}, labels={"label": 3})
    model = GMVAE(spec, latent=4, hidden=(8, 6)).eval()
    with torch.no_grad():
        model.clusters.log_scale.normal_()
        given = model(BATCH)
    posterior = Normal(given["mean"][:, None], (0.5 * given["logvar"])[:, None].exp())
    prior = Normal(model.clusters.centres, model.clusters.log_scale.exp())
    wanted = kl_divergence(posterior, prior).sum(2)
    torch.testing.assert_close(given["divergence"], wanted.detach(), rtol=1e-4, atol=1e-4)
