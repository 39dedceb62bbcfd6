"""Batched adapters equal the adapters of each row."""

import torch
from torch import nn

from stagesweep.systems.speech.model.lora import ExpertLinear, Route


def layer(experts: int = 3) -> tuple[ExpertLinear, Route]:
    route = Route()
    found = ExpertLinear(nn.Linear(6, 5), route, experts, rank=2, alpha=6.0, dropout=0.0)
    for matrix in found.B:
        nn.init.normal_(matrix)
    return found, route


def by_hand(found: ExpertLinear, x: torch.Tensor, expert: int, much: float = 1.0) -> torch.Tensor:
    added = found.B[expert] @ found.A[expert] * 3.0  # alpha / rank
    plain: torch.Tensor = x @ (found.base.weight + much * added).T + found.base.bias
    return plain


def test_each_row_has_its_expert() -> None:
    found, route = layer()
    x = torch.randn(5, 4, 6)
    rows = torch.tensor([2, 0, 2, 1, 0])
    with route.active(rows=rows):
        out = found(x)
    for row, expert in enumerate(rows.tolist()):
        torch.testing.assert_close(out[row], by_hand(found, x[row], expert))


def test_experts_are_mixed_by_weights() -> None:
    found, route = layer(2)
    x, weights = torch.randn(3, 4, 6), torch.rand(3, 2)
    with route.active(weights=weights):
        out = found(x)
    for row in range(3):
        a, b = weights[row].tolist()
        expected = by_hand(found, x[row], 0, a) + by_hand(found, x[row], 1, b) - found.base(x[row])
        torch.testing.assert_close(out[row], expected)


def test_a_new_expert_changes_nothing_and_no_route_is_the_base() -> None:
    route = Route()
    found = ExpertLinear(nn.Linear(6, 5), route, 2, 2, 4.0, 0.0)
    x = torch.randn(2, 3, 6)
    with route.active(rows=torch.tensor([0, 1])):
        torch.testing.assert_close(found(x), found.base(x))
    with route.active():
        assert torch.equal(found(x), found.base(x))


def test_only_experts_of_the_rows_have_gradients() -> None:
    found, route = layer()
    with route.active(rows=torch.tensor([1, 1])):
        found(torch.randn(2, 3, 6)).square().sum().backward()
    used = [float(matrix.grad.abs().sum()) for matrix in found.A if matrix.grad is not None]
    assert used[1] > 0
    assert used[0] == used[2] == 0
