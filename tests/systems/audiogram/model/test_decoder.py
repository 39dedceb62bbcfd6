import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stagesweep.base.spec import Features
from stagesweep.systems.audiogram.model.decoder import to_native

LOUD = Features(("a",), low=0.0, high=100.0)


def test_without_scale_it_is_the_plain_sigmoid() -> None:
    output = torch.linspace(-5, 5, 11)[:, None]
    torch.testing.assert_close(to_native(output, LOUD, None, None), 100 * output.sigmoid())


@given(shift=st.floats(-20, 120), scale=st.floats(0.1, 50), output=st.floats(-1e4, 1e4, width=32))
def test_bounded_features_stay_in_their_range(shift: float, scale: float, output: float) -> None:
    value = [torch.tensor([[number]], dtype=torch.float32) for number in (output, shift, scale)]
    native = to_native(value[0], LOUD, value[1], value[2]).item()
    assert 0 <= native <= 100


@pytest.mark.parametrize("shift", [15.0, 50.0, 80.0])
def test_centre_and_slope_are_shift_and_scale(shift: float) -> None:
    output = torch.zeros(1, 1, requires_grad=True)
    native = to_native(output, LOUD, torch.tensor([[shift]]), torch.tensor([[12.0]]))
    (slope,) = torch.autograd.grad(native.sum(), output)
    assert native.item() == pytest.approx(shift, rel=1e-5)
    assert slope.item() == pytest.approx(12.0, rel=1e-5)


def test_unbounded_features_are_scaled_back() -> None:
    output = torch.tensor([[1.0, -2.0]])
    free = Features(("a", "b"))
    assert torch.equal(to_native(output, free, None, None), output)
    native = to_native(output, free, torch.tensor([[10.0, 20.0]]), torch.tensor([[2.0, 3.0]]))
    assert torch.equal(native, torch.tensor([[12.0, 14.0]]))
