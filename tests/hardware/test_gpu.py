from collections.abc import Callable
from pathlib import Path

import pytest

from stagesweep.config import Device, Hardware, Precision
from stagesweep.errors import UserError
from stagesweep.hardware import gpu
from stagesweep.hardware.machine import choose


def outcome(decide: Callable[[Hardware], Precision], settings: Hardware) -> str:
    """A decision, or what is said against the profile."""
    try:
        return decide(settings)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("wanted", list(Precision))
@pytest.mark.parametrize("device", list(Device))
def test_it_is_the_precision_that_the_machine_has(device: Device, wanted: Precision) -> None:
    settings = Hardware(device=device, precision=wanted)
    assert outcome(gpu.precision, settings) == outcome(lambda s: choose(s)[1], settings)


def test_a_device_file_has_torch_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(gpu, "Path", lambda _: tmp_path)
    assert gpu.may_be_there()
    assert gpu.precision(Hardware()) is choose(Hardware())[1]
    (tmp_path / "nvidia0").unlink()
    assert not gpu.may_be_there()
    assert gpu.precision(Hardware()) is Precision.fp32


def test_the_cpu_needs_no_torch(needs_torch: Callable[[str], bool]) -> None:
    assert not needs_torch(
        "from stagesweep.config import Device, Hardware;"
        "from stagesweep.hardware.gpu import precision;"
        "precision(Hardware(device=Device.cpu))"
    )
