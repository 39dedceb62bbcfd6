"""Count likelihood by the outputs of a GMVAE."""

import pytest
import torch

from stagesweep.base.spec import Features, Spec
from stagesweep.systems.singlecell.likelihood import negative_binomial_nll
from stagesweep.systems.singlecell.loss.count_nll import CountNLL
from stagesweep.systems.singlecell.model.gmvae import GMVAE
from stagesweep.systems.singlecell.normalise import log_normalise

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
def test_the_outputs_of_the_model_choose_the_likelihood(likelihood: str) -> None:
    given = outputs(likelihood)
    total, weight = CountNLL()(given, BATCH)
    if likelihood == "mse":
        wanted = 0.5 * (given["scores"] - log_normalise(COUNTS, BATCH["library"])).square().sum()
    else:
        wanted = negative_binomial_nll(
            given["scores"], given["log_theta"], given.get("dropout"), COUNTS, BATCH["library"]
        )
    assert total.item() == pytest.approx(wanted.item())
    assert weight == 6
    assert ("dropout" in given) == (likelihood == "zinb")
