import os

import pytest

from stagesweep.config.schema import Hardware
from stagesweep.hardware import detection


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
