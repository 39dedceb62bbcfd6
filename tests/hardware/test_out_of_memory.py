"""Out of memory, simulated by a model that raises torch's errors above a number of samples."""

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from stagesweep.base.errors import OutOfMemory
from stagesweep.base.view import Batch
from stagesweep.config import schema
from stagesweep.core.predict import predict
from stagesweep.hardware.out_of_memory import OutOfMemoryRetry, is_out_of_memory, peak_mib
from stagesweep.hardware.profile import resolve

if TYPE_CHECKING:
    from fits import Bench

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU = resolve(schema.Hardware(device=schema.Device.cpu))
# torch's message about the memory of the CPU.
MESSAGE = (
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."
)


def cuda_error() -> RuntimeError:
    return torch.OutOfMemoryError("CUDA out of memory")


def cpu_error() -> RuntimeError:
    return RuntimeError(MESSAGE)


class Small(nn.Module):
    """A model on a device with memory for `room` samples, in training and evaluation."""

    def __init__(
        self,
        model: nn.Module,
        room: int,
        error: Callable[[], RuntimeError] = cuda_error,
        room_eval: int = 10**6,
    ) -> None:
        super().__init__()
        self.model, self.room, self.room_eval, self.error = model, room, room_eval, error

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if len(batch["x"]) > (self.room if self.training else self.room_eval):
            raise self.error()
        outputs: dict[str, Tensor] = self.model(batch)
        return outputs


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.out = nn.Linear(3, 6)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        mean = self.layer(batch["x"])
        return {"mean": mean, "x": self.out(mean)}


def small(room: int, **given: Any) -> Small:
    torch.manual_seed(1)
    return Small(Net(), room, **given)


def test_a_real_allocation_error_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert type(caught.value) is RuntimeError
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(cuda_error())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("error", [cuda_error, cpu_error])
def test_a_fit_in_smaller_parts_gives_the_same_numbers(
    bench: "Bench", caplog: pytest.LogCaptureFixture, error: Callable[[], RuntimeError]
) -> None:
    loss = {name: schema.Weight() for name in ("error", "masked", "spread")}
    whole = bench.loop(name="whole", model=small(10), loss=loss).run()
    loop = bench.loop(name="parts", model=small(3, error=error, room_eval=9), loss=loss)
    caplog.clear()
    assert loop.run() == pytest.approx(whole, rel=1e-5)
    assert loop.measured()["oom"] == [
        {"during": "training", "from": 10, "to": 5, "step": 1},
        {"during": "training", "from": 5, "to": 2, "step": 1},
        *({"during": "evaluation", "from": size, "to": size // 2, "step": 5} for size in (30, 15)),
    ]
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert said[0] == "out of memory in step 1 (training): 5 samples at a time instead of 10"
    assert len(said) == 4


def test_other_errors_are_not_retried() -> None:
    retry = OutOfMemoryRetry(None, "training", CPU)
    with pytest.raises(RuntimeError, match="shapes"):
        retry.run(lambda _: torch.zeros(2, 3) @ torch.zeros(2, 3) or None, 8)
    assert retry.events == []


@pytest.mark.parametrize(
    ("hardware", "remedies"),
    [
        (
            {},
            "make the model or the samples smaller, or set hardware.activation_checkpointing=true",
        ),
        ({"activation_checkpointing": True}, "make the model or the samples smaller"),
    ],
)
def test_too_little_memory_for_one_sample_is_an_error_with_remedies(
    bench: "Bench", hardware: dict[str, Any], remedies: str
) -> None:
    loop = bench.loop(model=small(0), hardware=hardware)
    with pytest.raises(OutOfMemory) as caught:
        loop.run()
    message = str(caught.value)
    assert message.startswith(
        "the machine has too little memory for one sample (training; tried 10, 5, 2, 1; peak "
    )
    assert message.endswith(f" MiB): {remedies}")
    assert [event["to"] for event in loop.measured()["oom"]] == [5, 2, 1]


def test_a_prediction_is_made_in_smaller_parts(bench: "Bench") -> None:
    loop = bench.loop()
    events: list[dict[str, Any]] = []
    model = small(0, room_eval=20).train()
    found = predict(model, loop.batches.view, ["mean"], CPU, batch_size=40, oom=events)
    assert events == [{"during": "prediction", "from": 40, "to": 20, "step": 0}]
    whole = predict(small(0), loop.batches.view, ["mean"], CPU)
    torch.testing.assert_close(found["mean"], whole["mean"])
    assert model.training


class Counted(nn.Module):
    """A model on a device whose memory counts every live tensor.

    A sample needs two activations. `room` is the number of samples that fit.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.net = room, Net()
        self.alive: list[weakref.ref[Tensor]] = []

    def count(self, made: Tensor) -> Tensor:
        """Count a new tensor, as an allocator does."""
        held = [tensor for each in self.alive if (tensor := each()) is not None]
        try:
            if sum(map(len, held)) + len(made) > 2 * self.room:
                raise cuda_error()
        except RuntimeError as error:
            kept = error  # as code that inspects an error and raises it again
            raise kept from None
        self.alive = [weakref.ref(tensor) for tensor in (*held, made)]
        return made

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if not self.training:
            return self.net(batch)  # type: ignore[no-any-return]
        mean = self.count(self.net.layer(batch["x"]))
        return {"mean": mean, "x": self.count(self.net.out(mean))}


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Disable garbage collection, which might free memory by chance."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize(
    ("room", "sizes"), [(24, [40, 20]), (13, [40, 20, 10]), (6, [40, 20, 10, 5])]
)
def test_a_failed_attempt_holds_no_memory_in_the_next(
    bench: "Bench", room: int, sizes: list[int]
) -> None:
    loop = bench.loop(model=Counted(room), batch_size=40, epochs=1)
    loop.run()
    events = loop.measured()["oom"]
    assert [(event["from"], event["to"]) for event in events] == list(pairwise(sizes))
    assert loop.micro_batches.size == sizes[-1]


@pytest.mark.usefixtures("no_collection")
def test_a_failed_attempt_of_the_search_holds_no_memory_in_the_next(
    bench: "Bench", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAGESWEEP_STORE", str(tmp_path / "store"))
    hardware = {"micro_batch": "auto"}
    loop = bench.loop(model=Counted(24), batch_size=40, epochs=1, hardware=hardware)
    loop.run()
    assert loop.micro_batches.size in (23, 24)
    assert loop.measured()["oom"] == []


def test_the_peak_of_a_process_is_in_mebibytes() -> None:
    before = peak_mib(torch.device("cpu"))
    held = torch.ones(int(before + 64) * 2**18)  # larger than its peak so far
    assert 32 < peak_mib(torch.device("cpu")) - before < 2 * (before + 64)
    assert held[0] == 1


@pytest.fixture
def full_gpu() -> Any:
    """A GPU on which torch may allocate another 200 MB."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2e8) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


class Wide(nn.Module):
    """Holds 4 MB of activations for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2**20))
        self.net = Net()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        grown = (batch["x"][:, :1] * self.weight).sin().mean(1, keepdim=True)
        return self.net({**batch, "x": batch["x"] + grown})  # type: ignore[no-any-return]


@pytest.mark.gpu
@GPU
@pytest.mark.usefixtures("full_gpu")
@pytest.mark.parametrize("micro_batch", [None, "auto"])
def test_a_fit_survives_out_of_memory_on_a_gpu(
    bench: "Bench", tmp_path: Any, monkeypatch: pytest.MonkeyPatch, micro_batch: str | None
) -> None:
    monkeypatch.setenv("STAGESWEEP_STORE", str(tmp_path / "store"))
    hardware = {"device": schema.Device.cuda, "precision": schema.Precision.fp32}
    loop = bench.loop(
        model=Wide(), batch_size=44, hardware=hardware | {"micro_batch": micro_batch}, epochs=2
    )
    loop.run()
    assert loop.micro_batches.size is not None
    assert 1 <= loop.micro_batches.size < 44
    training = [e for e in loop.measured()["oom"] if e["during"] == "training"]
    assert bool(training) == (micro_batch is None)
