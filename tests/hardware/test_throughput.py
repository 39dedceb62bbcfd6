from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from stagesweep.base.view import Batch
from stagesweep.hardware import throughput as module
from stagesweep.hardware.throughput import SPEED, Throughput
from stagesweep.tracking.tensorboard import read_rows

if TYPE_CHECKING:
    from fits import Bench


class Clock:
    """A clock that the test advances."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "perf_counter", found)
    return found


def test_waiting_and_working_time_are_counted(clock: Clock) -> None:
    def slow(count: int) -> Iterator[Batch]:
        for _ in range(count):
            clock.now += 1.0
            yield {"index": torch.arange(20)}

    meter = Throughput(torch.device("cpu"))
    assert meter.summary() == {}
    for _ in meter.batches(slow(4), [20] * 4):
        clock.now += 3.0
    assert meter.samples_per_second() == 80 / 16
    row = meter.end_epoch()
    assert {name: row[name] for name in SPEED[:3]} == {
        "samples_per_second": 80 / 16,
        "step_ms": 4000.0,
        "data_wait": 0.25,
    }
    assert row["peak_mib"] > 10
    clock.now += 100.0  # evaluation
    for _ in meter.batches(slow(1), [20]):
        clock.now += 9.0
    assert meter.end_epoch()["data_wait"] == pytest.approx(0.1)
    total = meter.summary()
    assert total["samples_per_second"] == pytest.approx(100 / 26)
    assert total["data_wait"] == pytest.approx(5 / 26)


def test_a_fit_reports_its_throughput(bench: "Bench") -> None:
    loop = bench.loop(epochs=3)
    loop.run()
    rows = [row for row in read_rows(loop.rows.path) if row["kind"] == "epoch"]
    speed = loop.measured()["speed"]
    assert list(speed) == list(SPEED)
    for numbers in (*rows, speed):
        assert all(numbers[name] > 0 for name in SPEED)
        assert numbers["data_wait"] < 1
    rates = [row["samples_per_second"] for row in rows]
    assert min(rates) <= speed["samples_per_second"] <= max(rates)
