"""The number of processes of a run, and the error of one that fails."""

import pickle
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from stagesweep.base.errors import Interrupted, Lost, NotFinite, UserError
from stagesweep.config.schema import Device, Hardware
from stagesweep.parallel.launch import _first_error, _write_error, is_follower, processes_to_start
from stagesweep.sweep.engine.slots import local_slots
from stagesweep.sweep.plugin import StudySweeper


@dataclass
class Failure:
    exitcode: int


def test_the_profile_sets_the_number_of_processes() -> None:
    assert processes_to_start(Hardware()) == 1
    assert processes_to_start(Hardware(devices=3)) == 3
    assert processes_to_start(Hardware(gpu_ids=[0, 2])) == 2
    assert processes_to_start(Hardware(devices=2, gpu_ids=[0, 2])) == 2


@pytest.mark.parametrize(("there", "count"), [(0, 1), (2, 2), (8, 4)])
def test_without_strict_there_are_no_more_processes_than_gpus(
    there: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stagesweep.hardware.detection.gpu_count", lambda: there)
    assert processes_to_start(Hardware(devices=4, strict=False)) == count
    assert processes_to_start(Hardware(devices=4, strict=False, device=Device.cpu)) == 4
    assert processes_to_start(Hardware(devices=4)) == 4


@pytest.mark.parametrize("device", [Device.cpu, Device.auto])
def test_more_than_two_processes_for_each_core_are_refused(
    monkeypatch: pytest.MonkeyPatch, device: Device
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr("stagesweep.hardware.detection.gpu_count", lambda: 0)
    assert processes_to_start(Hardware(devices=4, device=device)) == 4
    with pytest.raises(UserError) as caught:
        processes_to_start(Hardware(devices=99, device=device))
    assert str(caught.value) == (
        "hardware.devices=99 starts 99 processes on a CPU with 2 cores; set it so that there are "
        "at most 4, or set hardware.strict=false"
    )
    for slots, devices in ((99, 1), (3, 2), (1, 5)):
        with pytest.raises(UserError, match=r"hardware.strict=false$"):
            local_slots(slots, Hardware(devices=devices, device=device))
        assert len(local_slots(slots, Hardware(devices=devices, device=device, strict=False)))
    loose = Hardware(devices=99, device=Device.cpu, strict=False)
    assert processes_to_start(loose) == 99
    monkeypatch.setattr("stagesweep.hardware.detection.gpu_count", lambda: 8)
    assert processes_to_start(Hardware(devices=8)) == 8


def test_devices_and_gpu_ids_must_agree() -> None:
    with pytest.raises(UserError, match=r"hardware.devices=3, but hardware.gpu_ids=\[0, 1\]"):
        processes_to_start(Hardware(devices=3, gpu_ids=[0, 1]))


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_under_torchrun_no_processes_are_started(
    devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert processes_to_start(Hardware(devices=devices)) == 1


def test_under_torchrun_another_number_of_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError) as caught:
        processes_to_start(Hardware(devices=3))
    assert str(caught.value) == (
        "hardware.devices=3, but torchrun has started 4 processes; leave it out"
    )
    with pytest.raises(UserError, match="set CUDA_VISIBLE_DEVICES before it"):
        processes_to_start(Hardware(gpu_ids=[0]))
    sampler = OmegaConf.create({})
    with pytest.raises(UserError, match="a sweep cannot run under torchrun"):
        StudySweeper(sampler, "", "").sweep([])


@pytest.mark.parametrize(("size", "rank", "expected"), [("", "1", 0), ("2", "0", 0), ("2", "1", 1)])
def test_all_but_the_main_process_are_followers(
    size: str, rank: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", rank)
    assert is_follower() == bool(expected)


def test_the_error_of_the_first_failed_process_is_raised(tmp_path: Path) -> None:
    _write_error(tmp_path / "0", Lost("another has ended"))
    _write_error(tmp_path / "2", Interrupted(signal.SIGTERM, "told to stop"))
    _write_error(tmp_path / "1", NotFinite("the loss became nan"))
    reason = _first_error(tmp_path, {0: Failure(1)})
    assert isinstance(reason, NotFinite)
    assert str(reason) == "the loss became nan"


def test_a_bug_has_its_traceback(tmp_path: Path) -> None:
    try:
        raise ValueError("of the program")
    except ValueError as error:
        _write_error(tmp_path / "1", error)
    reason = _first_error(tmp_path, {})
    assert isinstance(reason, RuntimeError)
    assert str(reason).startswith("process 1 of the run failed:\n\nTraceback")
    assert "ValueError: of the program" in str(reason)


def test_a_process_that_was_killed_is_named(tmp_path: Path) -> None:
    _write_error(tmp_path / "0", Lost("another has ended"))
    reason = _first_error(tmp_path, {1: Failure(-signal.SIGKILL)})
    assert isinstance(reason, Lost)
    assert str(reason).startswith(
        "process 1 of the run was killed by SIGKILL; run the same command"
    )


def test_an_interruption_keeps_its_exit_status() -> None:
    error = pickle.loads(pickle.dumps(Interrupted(signal.SIGTERM, "told to stop")))
    assert (error.exit_code, str(error)) == (143, "told to stop")
