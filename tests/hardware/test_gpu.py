import os
from collections.abc import Callable
from pathlib import Path

import pytest

from stagesweep.config import Device, Hardware, Precision
from stagesweep.errors import UserError
from stagesweep.hardware import gpu
from stagesweep.hardware.machine import choose
from stagesweep.sweep.slots import leases


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


@pytest.mark.parametrize(("visible", "expected"), [(None, ["1", "3"]), ("0,1,2", ["1"]), ("2", [])])
def test_gpu_ids_are_those_of_the_slot_in_a_trial(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[str]
) -> None:
    monkeypatch.setattr(gpu, "may_be_there", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    settings = Hardware(gpu_ids=[1, 3])
    assert gpu.ids(settings) == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "0,1,2,3")
    gpu.select(settings)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join(expected)


def test_a_slot_holds_the_gpus_that_its_trial_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "may_be_there", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    found = leases("auto", Hardware(devices=2))
    assert [each.environment["CUDA_VISIBLE_DEVICES"] for each in found] == ["0,1", "2,3"]
