from pathlib import Path

import pytest
import torch

from stagesweep.sweep.engine import cuda_guard


def test_cuda_initialised_without_torch_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy and others initialise CUDA without torch."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    assert cuda_guard.initialised_by() is None
    with open(__file__):  # noqa: PTH123
        monkeypatch.setattr(cuda_guard, "DRIVER_FILE", str(Path(__file__).resolve()))
        assert cuda_guard.initialised_by() == "an imported package"
