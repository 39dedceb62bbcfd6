import pytest
import torch

from stagesweep.systems.audiogram.loss import Smoothness


def test_a_straight_audiogram_has_zero_loss_and_a_notch_its_square() -> None:
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


@pytest.mark.parametrize("size", [1, 7, 64])
def test_it_is_a_sum_over_samples_however_they_are_divided(size: int) -> None:
    decoded = torch.randn(100, 6, generator=torch.Generator().manual_seed(0)) * 20 + 40
    term = Smoothness("thresholds", count=5)
    total, weight = term({"thresholds": decoded}, {})
    parts = [term({"thresholds": part}, {}) for part in decoded.split(size)]
    # Only the order of the sum differs.
    assert sum(part.item() for part, _ in parts) == pytest.approx(total.item(), rel=1e-6)
    assert sum(n.item() for _, n in parts) == weight.item() == 100
