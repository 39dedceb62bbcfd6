from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stagesweep.base.errors import UserError
from stagesweep.config.schema import Device, Hardware, Precision
from stagesweep.hardware import detection
from stagesweep.hardware.numerics import numerics
from stagesweep.hardware.profile import choose_device


def outcome(decide: Callable[[Hardware], Precision], settings: Hardware) -> str:
    """The result, or the text of the error."""
    try:
        return decide(settings)
    except UserError as error:
        return str(error)


def precision(settings: Hardware) -> Precision:
    found: Precision = numerics(settings)["precision"]
    return found


@pytest.mark.parametrize("wanted", list(Precision))
@pytest.mark.parametrize("device", list(Device))
def test_auto_precision_is_resolved_for_the_machine(device: Device, wanted: Precision) -> None:
    settings = Hardware(device=device, precision=wanted)
    assert outcome(precision, settings) == outcome(lambda s: choose_device(s).precision, settings)


def test_torch_is_imported_only_with_a_device_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
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
        "from stagesweep.hardware.numerics import numerics;"
        "numerics(Hardware(device=Device.cpu))"
    )


def test_a_cpu_has_no_tf32() -> None:
    """A setting without effect on this machine is not in the fingerprint."""
    wanted = Hardware(device=Device.cpu, tf32=True)
    assert numerics(wanted) == numerics(Hardware(device=Device.cpu))


def test_tf32_changes_the_numerics_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagesweep.hardware.numerics.has_gpu_driver", lambda: True)
    monkeypatch.setattr("stagesweep.hardware.profile.has_gpu_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    wanted = {"device": Device.auto, "precision": Precision.fp32}
    assert [numerics(Hardware(**wanted, tf32=tf32))["tf32"] for tf32 in (None, True)] == [
        False,
        True,
    ]
