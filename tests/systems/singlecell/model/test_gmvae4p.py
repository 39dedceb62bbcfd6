"""The classifier of patients: scales, fusion weights, inputs and ablations."""

from typing import Any

import pytest
import torch

from stagesweep.base.spec import Features, Spec
from stagesweep.base.view import Batch, View
from stagesweep.systems.singlecell.model.gmvae4p import GMVAE4P

GENES, TYPES, WIDTH = 12, 3, 2


def names(n: int) -> Features:
    return Features(tuple(map(str, range(n))))


SPEC = Spec(
    {
        "expression": names(GENES),
        "proportions": names(TYPES),
        "states": names(TYPES * WIDTH),
        "communication": names(3),
    },
    labels={"condition": 2},
)


def batch(n: int = 10) -> Batch:
    draw = torch.Generator().manual_seed(0)
    expression = 5 + torch.randn(n, GENES, generator=draw) * torch.arange(1, GENES + 1)
    return {
        "expression": expression,
        "proportions": torch.rand(n, TYPES, generator=draw).softmax(1),
        "types": torch.rand(n, TYPES, generator=draw) > 0.3,
        "states": torch.randn(n, TYPES, WIDTH, generator=draw),
        "communication": torch.randn(n, 3, generator=draw),
        "pairs": torch.ones(n, 3, dtype=torch.bool),
    }


def make_model(**settings: Any) -> GMVAE4P:
    torch.manual_seed(0)
    model = GMVAE4P(SPEC, hidden=(16, 8), width=6, **settings).eval()
    model.adapt(View(batch()))
    return model


def test_scales_and_genes_come_from_the_training_data() -> None:
    model, seen = make_model(genes=5), batch()
    assert model.chosen.tolist() == seen["expression"].std(0).topk(5).indices.sort().values.tolist()
    outputs = model(seen)
    mask = outputs["states/observed"].bool()
    target = outputs["states/target"]
    for column in range(TYPES * WIDTH):
        own = target[:, column][mask[:, column]]
        assert own.mean().item() == pytest.approx(0, abs=1e-5)
        assert own.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(mask.view(-1, TYPES, WIDTH)[..., 0], seen["types"])


def test_fusion_weights_are_inverse_variances_and_proportions_add_up() -> None:
    model, seen = make_model(attention=False), batch()
    outputs = model(seen)
    precision = []
    for name in ("proportions", "states", "communication"):
        variance = outputs[f"{name}/logvar"].exp()
        if name == "states":
            share = outputs["proportions"].unsqueeze(2)
            variance = (variance.view(-1, TYPES, WIDTH) * share / WIDTH).sum(1, keepdim=True)
            precision.append(1 / variance.sum((1, 2)))
        else:
            precision.append(1 / variance.mean(1))
    wanted = torch.stack(precision, 1)
    torch.testing.assert_close(outputs["weights"], wanted / wanted.sum(1, keepdim=True))
    torch.testing.assert_close(outputs["proportions"].sum(1), torch.ones(10))
    equal = make_model(uncertainty=False)(seen)["weights"]
    torch.testing.assert_close(equal, torch.full((10, 3), 1 / 3))


def test_targets_are_not_inputs() -> None:
    """The prediction depends on expression only, not on true proportions or types."""
    model, seen = make_model(), batch()
    blind = {"expression": seen["expression"]}
    torch.testing.assert_close(model(blind)["assignment"], model(seen)["assignment"])


@pytest.mark.parametrize(
    "setting", [{"standardise": False}, {"attention": False}, {"modalities": ["proportions"]}]
)
def test_every_ablation_changes_the_prediction(setting: dict[str, Any]) -> None:
    full, without = make_model()(batch()), make_model(**setting)(batch())
    assert not torch.allclose(full["assignment"], without["assignment"])
