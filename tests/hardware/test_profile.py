import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stagesweep.base.errors import UserError
from stagesweep.config import schema
from stagesweep.config.nodes import hardware_settings
from stagesweep.config.schema import Device, Hardware, Precision
from stagesweep.hardware import profile as profile_module
from stagesweep.hardware.profile import CORES, choose_device, resolve

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


def test_settings_of_a_profile_are_kept() -> None:
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


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device": Device.cpu}, f"cpu, fp32, threads 1 or {CORES} by size of model, "
         f"loader workers {min(8, CORES // 2)}, whole batches"),
        ({"device": Device.cpu, "threads": 3, "workers": 2, "micro_batch": 8},
         "cpu, fp32, threads 3, loader workers 2, at most 8"),
        ({"device": Device.cpu, "threads": 3, "workers": 2, "micro_batch": "auto"},
         "cpu, fp32, threads 3, loader workers 2, micro-batch by a search"),
        pytest.param({"threads": 3, "workers": 2},
         "cpu (torch finds no GPU), fp32, threads 3, loader workers 2, whole batches",
         marks=NO_GPU),
    ],
)  # fmt: skip
def test_the_chosen_settings_are_logged(
    caplog: pytest.LogCaptureFixture, settings: dict[str, Any], said: str
) -> None:
    with caplog.at_level(logging.INFO):
        resolve(Hardware(**settings))
    assert [record.message for record in caplog.records] == [f"hardware: {said}"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        pytest.param(
            {"device": Device.cuda},
            "hardware.device=cuda, but torch finds no GPU; set hardware.device=cpu, or "
            "hardware.strict=false to fall back to it",
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
    ],
)
def test_impossible_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(Hardware(**settings))
    assert str(caught.value) == said


class Card:
    """Simulates a GPU with that much memory, with or without bf16."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gigabytes: float, bf16: bool) -> None:
        about = SimpleNamespace(total_memory=gigabytes * 1e9)
        for name, value in {
            "is_available": True,
            "is_bf16_supported": bf16,
            "get_device_name": "Card",
            "current_device": 0,
            "device_count": 1,
            "get_device_properties": about,
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
        monkeypatch.setattr(profile_module, "has_gpu_driver", lambda: True)


@pytest.mark.parametrize(
    ("settings", "fault", "instead", "precision"),
    [
        (
            {"min_memory_gb": 80.0},
            "this profile is for a GPU of 80 GB, and Card has 42; choose another hardware=, or set "
            "hardware.strict=false",
            "this profile is for a GPU of 80 GB, and Card has 42: using hardware.micro_batch=auto",
            Precision.fp32,
        ),
        (
            {"precision": Precision.bf16},
            "hardware.precision=bf16 is not supported by this GPU; set it to fp16 or fp32",
            "hardware.precision=bf16 is not supported by this GPU: using fp32",
            Precision.fp32,
        ),
        (
            {"devices": 2},
            "hardware.devices=2, but torch finds 1 GPU; set it to 1, or set hardware.device=cpu or "
            "hardware.strict=false",
            "hardware.devices=2, but torch finds 1 GPU: using 1 process",
            Precision.fp32,
        ),
    ],
)
def test_a_gpu_that_does_not_match_the_profile(
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    fault: str,
    instead: str,
    precision: Precision,
) -> None:
    Card(monkeypatch, 42.4, bf16=False)
    with pytest.raises(UserError) as caught:
        choose_device(Hardware(device=Device.cuda, **settings))
    assert str(caught.value) == fault
    found = choose_device(Hardware(device=Device.cuda, strict=False, **settings))
    assert found.fallbacks == [instead]
    assert found.precision is precision
    assert found.small_memory == ("min_memory_gb" in settings)


def test_a_gpu_that_matches_is_not_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    Card(monkeypatch, 42.4, bf16=True)
    found = choose_device(Hardware(min_memory_gb=40.0))
    assert (found.device.type, found.precision, found.tf32) == ("cuda", Precision.bf16, True)
    assert (found.fallbacks, found.small_memory) == ([], False)


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
@pytest.mark.parametrize("tf32", [None, True, False])
def test_tf32_follows_the_precision_unless_it_is_set(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, tf32: bool | None
) -> None:
    Card(monkeypatch, 42.4, bf16=True)
    wanted = precision is Precision.bf16 if tf32 is None else tf32
    assert choose_device(Hardware(precision=precision, tf32=tf32)).tf32 == wanted
    assert not choose_device(Hardware(device=Device.cpu, precision=precision, tf32=tf32)).tf32


@NO_GPU
def test_the_fallback_without_a_gpu_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    settings = Hardware(device=Device.cuda, precision=Precision.fp16, tf32=True, strict=False)
    machine = resolve(settings)
    assert (machine.device.type, machine.precision, machine.tf32) == ("cpu", Precision.fp32, False)
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        "hardware.device=cuda, but torch finds no GPU: using the CPU in fp32"
    ]


BOUNDS = {"speech*/gating*": 512, "speech*/expert*": 4, "*/asr": 6}


@pytest.mark.parametrize(
    ("general", "stage", "expected"),
    [
        (None, "speech/gating", 512),
        (None, "speech_small/experts", 4),
        (None, "digits/joint", None),
        (64, "digits/joint", 64),
        (64, "speech/gating", 64),
        (64, "speech/asr", 6),
    ],
)
def test_the_smallest_bound_of_a_stage_is_its_micro_batch(
    general: int | None, stage: str, expected: int | None
) -> None:
    settings = Hardware(device=Device.cpu, micro_batch=general, micro_batches=BOUNDS)
    assert resolve(settings).for_stage(stage).micro_batch == expected


@pytest.mark.parametrize(
    ("profile", "gate", "others"),
    [("a100_40gb", 512, 4), ("a100_80gb", 1024, 8), ("h100_80gb", 2048, 12)],
)
@pytest.mark.usefixtures("threads")
def test_profiles_bound_the_stages_of_speech_as_its_recipe_advises(
    compose: Any, profile: str, gate: int, others: int
) -> None:
    words = (f"hardware={profile}", "hardware.device=cpu", "hardware.strict=false")
    cfg = compose("experiment=speech_full", "data.path=table.csv", *words)
    machine = resolve(hardware_settings(cfg))
    found = {name: machine.for_stage(f"speech_full/{name}").micro_batch for name in cfg.stage}
    assert found["gate"] == gate
    assert found["experts"] == found["asr"] == others
    assert cfg.stage.asr.batch_size == 16, "of a step, whatever the profile"


def test_a_searched_micro_batch_has_no_bound() -> None:
    settings = Hardware(device=Device.cpu, micro_batch="auto", micro_batches=BOUNDS)
    machine = resolve(settings).for_stage("speech/gating")
    assert machine.search_micro_batch
    assert machine.micro_batch is None


@pytest.mark.parametrize(
    ("wanted", "parameters", "expected"),
    [(None, 5_000, 1), (None, 2_000_000, CORES), (3, 5_000, 3), (3, 2_000_000, 3)],
)
@pytest.mark.usefixtures("threads")
def test_threads_follow_the_model_unless_they_are_set(
    wanted: int | None, parameters: int, expected: int
) -> None:
    resolve(Hardware(device=Device.cpu, threads=wanted)).set_threads(parameters)
    assert torch.get_num_threads() == expected


@pytest.mark.gpu
@GPU
def test_auto_takes_the_gpu_and_bf16_where_it_can() -> None:
    machine = resolve(schema.Hardware())
    assert machine.device.type == "cuda"
    best = Precision.bf16 if torch.cuda.is_bf16_supported() else Precision.fp32
    assert machine.precision is best


@pytest.mark.gpu
@GPU
def test_fp16_on_a_gpu() -> None:
    machine = resolve(schema.Hardware(device=Device.cuda, precision=Precision.fp16))
    assert machine.autocast is torch.float16


@pytest.fixture
def _own_flags() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = False


@pytest.mark.gpu
@GPU
@pytest.mark.usefixtures("_own_flags")
def test_on_a_gpu_fp32_is_exact_unless_tf32_is_set() -> None:
    def error() -> float:
        torch.manual_seed(0)
        one, other = torch.randn(2, 256, 256, device="cuda").unbind()
        image = torch.randn(1, 8, 16, 16, device="cuda")
        kernel = torch.randn(4, 8, 3, 3, device="cuda")
        pairs = [
            (one @ other, one.double() @ other.double()),
            (
                torch.nn.functional.conv2d(image, kernel),
                torch.nn.functional.conv2d(image.double(), kernel.double()),
            ),
        ]
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)

    fp32 = {"device": Device.cuda, "precision": Precision.fp32}
    resolve(Hardware(**fp32))  # type: ignore[arg-type]
    assert error() < 1e-5
    resolve(Hardware(**fp32, tf32=True))  # type: ignore[arg-type]
    if torch.cuda.get_device_capability() >= (8, 0):
        assert 1e-5 < error() < 1e-2
