"""The terms of a GMVAE: counts, mixture, labels."""

import pytest
import torch
from torch.distributions import Categorical, Normal, kl_divergence

from stagesweep.base.spec import Features, Spec
from stagesweep.loss.cross_entropy import CrossEntropy
from stagesweep.systems.singlecell.likelihood import negative_log_likelihood
from stagesweep.systems.singlecell.loss.counts import Counts
from stagesweep.systems.singlecell.loss.mixture import Mixture
from stagesweep.systems.singlecell.model.gmvae import GMVAE
from stagesweep.systems.singlecell.normalise import normalised

COUNTS = torch.poisson(torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) * 4)
BATCH = {
    "counts": COUNTS,
    "library": COUNTS.sum(1, keepdim=True),
    "label": torch.tensor([0, 1, 2, -1, 1, 0]),
}


def outputs(likelihood: str = "zinb") -> dict[str, torch.Tensor]:
    spec = Spec({"counts": Features(tuple("abcde"))}, labels={"label": 3})
    model = GMVAE(spec, latent=4, hidden=(8, 6), likelihood=likelihood).eval()  # type: ignore[arg-type]
    found: dict[str, torch.Tensor] = model(BATCH)
    return found


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "mse"])
def test_the_model_says_by_which_likelihood(likelihood: str) -> None:
    given = outputs(likelihood)
    total, weight = Counts()(given, BATCH)
    if likelihood == "mse":
        wanted = 0.5 * (given["scores"] - normalised(COUNTS, BATCH["library"])).square().sum()
    else:
        wanted = negative_log_likelihood(
            given["scores"], given["log_theta"], given.get("dropout"), COUNTS, BATCH["library"]
        )
    assert total.item() == pytest.approx(wanted.item())
    assert weight == 6
    assert ("dropout" in given) == (likelihood == "zinb")


def test_the_mixture_is_its_bound() -> None:
    """With q(k|x) at its best the two divergences are -log sum_k pi_k exp(-KL_k)."""
    given = outputs()
    total, weight = Mixture()(given, BATCH)
    best = -(given["log_prior"] - given["divergence"]).logsumexp(1).sum()
    assert total.item() == pytest.approx(best.item(), rel=1e-5)
    assert weight == 6


def test_a_known_label_is_its_component() -> None:
    given = outputs()
    total, _ = Mixture("label")(given, BATCH)
    alone, _ = Mixture()({k: v[3:4] if len(v) == 6 else v for k, v in given.items()}, {})
    cost = given["divergence"] - given["log_prior"]
    wanted = alone + sum(cost[n, k] for n, k in enumerate(BATCH["label"].tolist()) if k >= 0)
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_labels_that_are_unknown_do_not_count() -> None:
    given = outputs()
    total, weight = CrossEntropy("label")(given, BATCH)
    told = Categorical(logits=given["log_assignment"])
    known = BATCH["label"] >= 0
    wanted = -told.log_prob(BATCH["label"].clamp(min=0))[known].sum()
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert weight == 5
    none = BATCH | {"label": torch.full((6,), -1)}
    assert [value.item() for value in CrossEntropy("label")(given, none)] == [0, 0]


def test_the_divergence_is_that_of_gaussians() -> None:
    spec = Spec({"counts": Features(tuple("abcde"))}, labels={"label": 3})
    model = GMVAE(spec, latent=4, hidden=(8, 6)).eval()
    with torch.no_grad():
        model.clusters.log_scale.normal_()
        given = model(BATCH)
    posterior = Normal(given["mean"][:, None], (0.5 * given["logvar"])[:, None].exp())
    prior = Normal(model.clusters.centres, model.clusters.log_scale.exp())
    wanted = kl_divergence(posterior, prior).sum(2)
    torch.testing.assert_close(given["divergence"], wanted.detach(), rtol=1e-4, atol=1e-4)
