import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from stagesweep import config
from stagesweep.config import Device, Hardware, Precision
from stagesweep.errors import UserError
from stagesweep.hardware.machine import CORES, resolve

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_cpu_computes_in_fp32() -> None:
    machine = resolve(Hardware(device=Device.cpu))
    assert machine.device == torch.device("cpu")
    assert machine.precision is Precision.fp32
    assert machine.autocast is None


def test_bf16_on_the_cpu() -> None:
    machine = resolve(Hardware(device=Device.cpu, precision=Precision.bf16))
    assert machine.precision is Precision.bf16
    assert machine.autocast is torch.bfloat16


@NO_GPU
def test_auto_without_a_gpu_is_the_cpu() -> None:
    assert resolve(Hardware()) == resolve(Hardware(device=Device.cpu))


def test_what_a_profile_says_is_passed_on() -> None:
    settings = Hardware(
        device=Device.cpu,
        micro_batch=64,
        workers=3,
        compile=True,
        activation_checkpointing=True,
    )
    machine = resolve(settings)
    assert (machine.micro_batch, machine.workers) == (64, 3)
    assert machine.compile
    assert machine.activation_checkpointing


def test_it_says_what_was_chosen(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        resolve(Hardware(device=Device.cpu))
    assert [record.message for record in caplog.records] == ["hardware: cpu, fp32"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        pytest.param(
            {"device": Device.cuda},
            "hardware.device=cuda, but torch finds no GPU; set hardware.device=cpu",
            marks=NO_GPU,
        ),
        (
            {"device": Device.cpu, "precision": Precision.fp16},
            "hardware.precision=fp16 needs a GPU; set it to bf16 or fp32",
        ),
        (
            {"device": Device.cpu, "gpu_ids": [0, 1]},
            "hardware.gpu_ids=[0, 1], but no GPU is used; leave it out",
        ),
        ({"micro_batch": 0}, "hardware.micro_batch=0 must be at least 1"),
    ],
)
def test_what_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(Hardware(**settings))
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("wanted", "parameters", "expected"),
    [(None, 5_000, 1), (None, 2_000_000, CORES), (3, 5_000, 3), (3, 2_000_000, 3)],
)
@pytest.mark.usefixtures("threads")
def test_threads_follow_the_model_unless_the_profile_says(
    wanted: int | None, parameters: int, expected: int
) -> None:
    resolve(Hardware(device=Device.cpu, threads=wanted)).set_threads(parameters)
    assert torch.get_num_threads() == expected


@pytest.mark.gpu
@GPU
def test_auto_takes_the_gpu_and_bf16_where_it_can() -> None:
    machine = resolve(config.Hardware())
    assert machine.device.type == "cuda"
    best = Precision.bf16 if torch.cuda.is_bf16_supported() else Precision.fp32
    assert machine.precision is best


@pytest.mark.gpu
@GPU
def test_fp16_on_a_gpu() -> None:
    machine = resolve(config.Hardware(device=Device.cuda, precision=Precision.fp16))
    assert machine.autocast is torch.float16
