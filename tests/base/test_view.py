import pytest
import torch

from stagesweep.base.view import View


def view(n: int = 5) -> View:
    return View({"x": torch.arange(2 * n).reshape(n, 2), "label": torch.arange(n) % 2})


def test_columns_must_have_one_length() -> None:
    with pytest.raises(ValueError, match="columns must have one length"):
        View({"x": torch.zeros(3), "y": torch.zeros(4)})


def test_batches_are_the_split_in_order() -> None:
    batches = list(view().batches(2))
    assert [batch["index"].tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    assert torch.equal(torch.cat([batch["x"] for batch in batches]), view()["x"])


def test_an_order_has_every_row_once_and_can_start_in_the_middle() -> None:
    order = list(view().order(2, torch.Generator().manual_seed(0)))
    assert sorted(torch.cat(order).tolist()) == list(range(5))
    found = [batch["index"].tolist() for batch in view().gather(order, start=1)]
    assert found == [rows.tolist() for rows in order[1:]]


def test_rows_and_joined_views_are_numbered_anew() -> None:
    taken = view().take(torch.tensor([3, 1]))
    assert taken["x"][:, 0].tolist() == [6, 2]
    both = taken.join([view(2)])
    assert (len(both), both["index"].tolist()) == (4, [0, 1, 2, 3])
    assert "label" in both
