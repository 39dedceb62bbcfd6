import pytest
import torch

from stagesweep.systems.audiogram.loss import Smoothness


def test_a_straight_audiogram_costs_nothing_and_a_notch_its_square() -> None:
    straight = torch.tensor([[10.0, 20.0, 30.0, 40.0, 50.0, 90.0]])
    scale = torch.full((1, 6), 10.0)
    batch = {"thresholds/shift": torch.full((1, 6), 30.0), "thresholds/scale": scale}
    term = Smoothness("thresholds", count=5)  # the sixth is a click
    assert term({"thresholds": straight}, batch)[0].item() == pytest.approx(0, abs=1e-10)
    notched = straight.clone()
    notched[0, 2] += 10  # second differences of 1, -2, 1 standard units
    total, weight = term({"thresholds": notched}, batch)
    assert total.item() == pytest.approx(6.0)
    assert weight.item() == 1
    everything, _ = Smoothness("thresholds")({"thresholds": straight}, {})
    assert everything.item() == pytest.approx(30.0**2)
