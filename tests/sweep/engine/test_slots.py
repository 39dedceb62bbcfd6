import logging
import multiprocessing

import pytest

from stagesweep.config.schema import Hardware
from stagesweep.hardware import detection
from stagesweep.sweep.engine import slots


@pytest.mark.parametrize("package", [None, "eager_package"])
def test_trials_are_spawned_if_cuda_is_initialised(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, package: str | None
) -> None:
    monkeypatch.setattr(detection, "has_gpu_driver", lambda: True)
    monkeypatch.setattr(slots, "_call_in_process", lambda *_: package)
    backend = object.__new__(slots.SlotBackend)
    backend._forkserver = multiprocessing.get_context("forkserver")
    with caplog.at_level(logging.WARNING):
        methods = {backend.context.get_start_method() for _ in range(2)}
    assert methods == {"spawn" if package else "forkserver"}
    assert [record.message.partition(" ")[0] for record in caplog.records] == [package] * bool(
        package
    )


def test_a_slot_holds_the_gpus_that_its_trial_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "has_gpu_driver", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    found = slots.local_slots("auto", Hardware(devices=2))
    assert [each.environment["CUDA_VISIBLE_DEVICES"] for each in found] == ["0,1", "2,3"]
