import pytest
import torch
from torch import Tensor

from stagesweep.base.errors import UserError
from stagesweep.base.view import Batch
from stagesweep.loss.reconstruction import Reconstruction

Given = tuple[dict[str, Tensor], Batch]


@pytest.fixture
def given() -> Given:
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(20, 6, generator=g) > 0.3
    batch = {
        "thresholds": torch.randn(20, 6, generator=g).masked_fill(~mask, 0),
        "thresholds/mask": mask,
        "thresholds/shift": 30 + torch.rand(20, 6, generator=g),
        "thresholds/scale": 10 + torch.rand(20, 6, generator=g),
        "pca": torch.randn(20, 2, generator=g),
        "sex": torch.randint(0, 3, (20,), generator=g),
        "index": torch.arange(20),
    }
    outputs = {
        "mean": torch.randn(20, 4, generator=g),
        "thresholds": 100 * torch.rand(20, 6, generator=g),
        "pca": torch.randn(20, 2, generator=g),
        "sex": torch.randn(20, 3, generator=g),
    }
    return outputs, batch


def test_total_equals_the_sum_by_loops(given: Given) -> None:
    outputs, batch = given
    expected = 0.0
    for i in range(20):
        for j in range(6):
            if batch["thresholds/mask"][i, j]:
                native = outputs["thresholds"][i, j] - batch["thresholds/shift"][i, j]
                error = native / batch["thresholds/scale"][i, j] - batch["thresholds"][i, j]
                expected += 2.0 * error.item() ** 2
        expected += 1.5 * sum((outputs["pca"][i] - batch["pca"][i]).square().tolist())
        if batch["sex"][i] > 0:
            expected -= outputs["sex"][i].log_softmax(0)[batch["sex"][i]].item()
    total, weight = Reconstruction({"thresholds": 2.0, "pca": 1.5})(outputs, batch)
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert weight.item() == 20


def test_chunks_add_up(given: Given) -> None:
    term = Reconstruction()
    whole = torch.stack(term(*given))
    parts = [
        torch.stack(term(*({k: v[rows] for k, v in columns.items()} for columns in given)))
        for rows in (slice(0, 7), slice(7, 20))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_missing_values_have_no_gradient(given: Given) -> None:
    outputs, batch = given
    outputs["thresholds"].requires_grad_()
    outputs["sex"].requires_grad_()
    Reconstruction()(outputs, batch)[0].backward()
    assert (outputs["thresholds"].grad[~batch["thresholds/mask"]] == 0).all()
    assert (outputs["thresholds"].grad[batch["thresholds/mask"]] != 0).all()
    assert (outputs["sex"].grad[batch["sex"] == 0] == 0).all()


def test_a_category_without_known_values_has_zero_loss(given: Given) -> None:
    outputs, batch = given
    batch["sex"] = torch.zeros(20, dtype=torch.int64)
    total, _ = Reconstruction({"thresholds": 0.0, "pca": 0.0})(outputs, batch)
    assert total.item() == 0


def test_a_weight_for_an_undecoded_name_is_an_error(given: Given) -> None:
    with pytest.raises(UserError, match=r"weights names 'treshold'.*thresholds, pca, sex"):
        Reconstruction({"treshold": 1.0})(*given)
