from typing import Any

import pytest
import torch
from steps import TERMS, Square, gradients, make_batch, make_step
from torch import Tensor

from stagesweep.config import schema


def test_terms_of_weight_zero_are_not_computed() -> None:
    weights = {"square": schema.Weight(1.0), "contrastive": schema.Weight(0.0)}
    assert list(make_step([], weights=weights).loss.terms) == ["square"]


@pytest.mark.parametrize(
    ("position", "expected"), [(0.0, [0.0, 0.5]), (1.0, [0.75, 0.5]), (4, [3, 0.5]), (9, [3, 0.5])]
)
def test_ramps_rise_from_zero(position: float, expected: list[float]) -> None:
    weights = {"square": schema.Weight(3.0, ramp=4.0), "masked": schema.Weight(0.5)}
    step = make_step([], weights=weights)
    assert step.loss.factors(position).tolist() == pytest.approx(expected)
    batch = make_batch(8)
    step.backward(batch, position)
    full = make_step(
        [],
        weights={n: schema.Weight(w) for n, w in zip(weights, expected, strict=True) if w},
    )
    full.backward(batch, 0.0)
    torch.testing.assert_close(gradients(step.model), gradients(full.model))


def test_terms_are_computed_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Looks(Square):
        def forward(self, *given: Any) -> tuple[Tensor, Tensor]:
            seen.append(torch.get_float32_matmul_precision())
            return super().forward(*given)

    monkeypatch.setitem(TERMS, "square", Looks())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for micro_batch in (None, 4):
            make_step(["square"], micro_batch=micro_batch).backward(make_batch(8), 0.0)
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}
