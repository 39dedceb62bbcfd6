"""Benchmarks are modules of the checkout. They set the number of threads of torch."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the benchmarks importable; restore the number of threads."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
