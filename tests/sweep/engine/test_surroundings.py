"""A disk that is full, or a study that is gone, ends a sweep and costs no trial."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sweep.conftest import Lab

GIVEN = ("stage.toy.x=1,2,3", "stage.toy.seconds=0.3", "sweep.slots=1")


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Leave no room on a disk."""
    with (disk / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
        while True:
            ballast.write(bytes(4096))
    try:
        yield
    finally:
        (disk / "ballast").unlink()


def goes_on(lab: "Lab") -> bool:
    """The same command runs what is left, and each trial ends once."""
    lab.sweep(*GIVEN)
    return [(t.state.name, t.value) for t in lab.study.trials] == [
        ("COMPLETE", 1.0),
        ("COMPLETE", 2.0),
        ("COMPLETE", 3.0),
    ]


def test_a_full_store(lab: "Lab", small_disk: Path) -> None:
    lab.environment["STAGESWEEP_STORE"] = str(small_disk / "store")
    with full(small_disk):
        _, errors = lab.sweep(*GIVEN, status=1)
    (line,) = errors.splitlines()
    assert line.startswith("stagesweep: sweep stopped at #0: disk full: cannot write ")
    assert line.endswith("when that works again, the same command goes on with what is left")
    assert [trial.state.name for trial in lab.study.trials] == ["RUNNING"]
    assert goes_on(lab)


@pytest.mark.parametrize("cause", ["full", "removed"])
def test_a_study_that_cannot_be_written(lab: "Lab", small_disk: Path, cause: str) -> None:
    (lab.folder / "sweep").symlink_to(small_disk)
    process = lab.start(*GIVEN)
    while not list(lab.log.iterdir()):  # until the first trial has ended
        assert process.poll() is None, process.output()
        time.sleep(0.01)
    if cause == "full":
        with full(small_disk):
            process.wait(120)
    else:
        (small_disk / "study.db").unlink()
        process.wait(120)
    (line,) = process.output()[1].splitlines()
    assert process.returncode == 1
    assert line.startswith("stagesweep: ")
    assert "the same command goes on" in line
    assert goes_on(lab)
