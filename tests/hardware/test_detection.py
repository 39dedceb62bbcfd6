import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stagesweep.base.errors import UserError
from stagesweep.config.schema import Device, Hardware, Precision
from stagesweep.hardware import detection, numerics, profile
from stagesweep.hardware.profile import choose_device
from stagesweep.sweep.engine.slots import leases


def outcome(decide: Callable[[Hardware], Precision], settings: Hardware) -> str:
    """A decision, or what is said against the profile."""
    try:
        return decide(settings)
    except UserError as error:
        return str(error)


def precision(settings: Hardware) -> Precision:
    found: Precision = numerics.numerics(settings)["precision"]
    return found


@pytest.mark.parametrize("wanted", list(Precision))
@pytest.mark.parametrize("device", list(Device))
def test_it_is_the_precision_that_the_machine_has(device: Device, wanted: Precision) -> None:
    settings = Hardware(device=device, precision=wanted)
    assert outcome(precision, settings) == outcome(lambda s: choose_device(s).precision, settings)


def test_a_device_file_has_torch_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(detection, "Path", lambda _: tmp_path)
    assert detection.has_gpu_driver()
    assert precision(Hardware()) is choose_device(Hardware()).precision
    (tmp_path / "nvidia0").unlink()
    assert not detection.has_gpu_driver()
    assert precision(Hardware()) is Precision.fp32


def test_the_cpu_needs_no_torch(needs_torch: Callable[[str], bool]) -> None:
    assert not needs_torch(
        "from stagesweep.config.schema import Device, Hardware;"
        "from stagesweep.hardware.detection import numerics;"
        "numerics(Hardware(device=Device.cpu))"
    )


def test_a_cpu_has_no_tf32() -> None:
    """What has no effect on this machine is not in a fingerprint."""
    wanted = Hardware(device=Device.cpu, tf32=True)
    assert numerics.numerics(wanted) == numerics.numerics(Hardware(device=Device.cpu))


def test_where_there_is_a_gpu_tf32_is_another_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "has_gpu_driver", lambda: True)
    monkeypatch.setattr(profile, "has_gpu_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    wanted = {"device": Device.auto, "precision": Precision.fp32}
    assert [numerics.numerics(Hardware(**wanted, tf32=tf32))["tf32"] for tf32 in (None, True)] == [
        False,
        True,
    ]


@pytest.mark.parametrize(("visible", "expected"), [(None, ["1", "3"]), ("0,1,2", ["1"]), ("2", [])])
def test_gpu_ids_are_those_of_the_slot_in_a_trial(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[str]
) -> None:
    monkeypatch.setattr(detection, "has_gpu_driver", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    settings = Hardware(gpu_ids=[1, 3])
    assert detection.gpu_ids(settings) == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "0,1,2,3")
    detection.set_visible_gpus(settings)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join(expected)


def test_a_slot_holds_the_gpus_that_its_trial_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "has_gpu_driver", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    found = leases("auto", Hardware(devices=2))
    assert [each.environment["CUDA_VISIBLE_DEVICES"] for each in found] == ["0,1", "2,3"]
