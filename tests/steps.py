"""A small model, loss terms of every kind, and a step of them: for tests of gradients."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stagesweep.base.view import Batch
from stagesweep.config import schema
from stagesweep.core.loss import WeightedLoss
from stagesweep.core.predict import forward
from stagesweep.hardware.profile import HardwareProfile, resolve
from stagesweep.loss.alignment import Alignment
from stagesweep.loss.supervised_contrastive import SupervisedContrastive
from stagesweep.parallel.micro_batches import MicroBatches
from stagesweep.parallel.process_group import SINGLE_PROCESS, ProcessGroup

CPU = resolve(schema.Hardware(device=schema.Device.cpu, precision=schema.Precision.fp32))

D = 5


class Model(nn.Module):
    """A linear map with dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Dropout(dropout))
        self.outer = nn.Linear(7, 4)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        mean = self.outer(self.inner(batch["x"]))
        outputs = {"mean": mean, "projection": nn.functional.normalize(mean, dim=1)}
        if "positive/x" in batch:
            positive = self.outer(self.inner(batch["positive/x"]))
            outputs["positive/projection"] = nn.functional.normalize(positive, dim=1)
        return outputs


class Square(nn.Module):
    """Per sample."""

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        total = (outputs["mean"] - batch["y"]).square().sum()
        return total, total.new_tensor(len(batch["y"]))


class Masked(nn.Module):
    """A mean over what is observed: micro-batches have unequal weights, and some have none."""

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        error = (outputs["mean"] - batch["y"]).abs() * batch["mask"]
        return error.sum(), batch["mask"].sum()


class Pairs(nn.Module):
    """Couples all samples, in the precision of the model."""

    whole_batch = ("mean", "projection")

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        similarity = outputs["projection"] @ outputs["projection"].T
        far = (outputs["mean"][:, None] - outputs["mean"]).square().sum(2)
        total = (similarity - far * batch["mask"][:, :1]).logsumexp(1).sum()
        return total, total.new_tensor(len(similarity))


TERMS: dict[str, nn.Module] = {
    "square": Square(),
    "masked": Masked(),
    "pairs": Pairs(),
    "contrastive": SupervisedContrastive(temperature=0.3, label="label"),
    "consistency": Alignment("label"),
}
WEIGHTS = {"square": 0.7, "masked": 2.0, "pairs": 0.5, "contrastive": 1.5, "consistency": 0.3}


def make_batch(n: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Batch:
    draw = torch.Generator().manual_seed(n)
    batch = {
        "x": torch.randn(n, D, generator=draw, dtype=dtype),
        "positive/x": torch.randn(n, D, generator=draw, dtype=dtype),
        "y": torch.randn(n, 4, generator=draw, dtype=dtype),
        # The first samples have nothing observed.
        "mask": (torch.rand(n, 4, generator=draw) < torch.linspace(-0.3, 1, n)[:, None]).to(dtype),
        "label": torch.randint(-1, 3, (n,), generator=draw),
        "index": torch.arange(n),
    }
    return {name: column.to(device) for name, column in batch.items()}


class Step:
    """Forward and backward of a batch, without the optimizer."""

    def __init__(
        self,
        model: nn.Module,
        loss: WeightedLoss,
        hardware: HardwareProfile,
        group: ProcessGroup = SINGLE_PROCESS,
        fsdp: Any = None,
    ) -> None:
        fp16 = hardware.precision is schema.Precision.fp16
        self.model, self.loss = model, loss
        self.scaler = torch.amp.GradScaler(hardware.device.type, enabled=fp16)
        self.forward = partial(forward, model, hardware)
        self.micro_batches = MicroBatches(model, self.scaler, hardware, group, fsdp)

    def backward(self, batch: Batch, position: float = 0.0, samples: int | None = None) -> Tensor:
        factors = self.loss.factors(position)
        return self.micro_batches.backward(batch, self.forward, self.loss, factors, samples)


def make_step(
    names: Iterable[str],
    *,
    micro_batch: int | None = None,
    dropout: float = 0.0,
    hardware: HardwareProfile = CPU,
    dtype: torch.dtype = torch.float64,
    weights: Mapping[str, schema.Weight] | None = None,
    model: nn.Module | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
    fsdp: Any = None,
) -> Step:
    torch.manual_seed(0)
    model = model or Model(dropout).to(hardware.device, dtype)
    weights = weights or {name: schema.Weight(WEIGHTS[name]) for name in names}
    loss = WeightedLoss(TERMS, weights, hardware.device)
    return Step(model, loss, replace(hardware, micro_batch=micro_batch), group, fsdp)


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def by_hand(step: Step, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    """Gradient of sum(w * total / weight) over the undivided batch, and (total, weight)."""
    step.model.zero_grad()
    pairs = {name: TERMS[name](outputs, batch) for name in step.loss.terms}
    sum(
        step.loss.weights[name] * total / weight
        for name, (total, weight) in pairs.items()
        if weight > 0
    ).backward()
    return gradients(step.model), torch.tensor([[t.item(), w.item()] for t, w in pairs.values()])


class Small(Model):
    """Simulates a GPU with memory for a number of samples."""

    def __init__(self, room: int) -> None:
        super().__init__(0.0)
        self.room = room

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if len(batch["x"]) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(batch)


class SmallAtTheEnd(Small):
    """Runs out of memory near the end of the backward pass."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        def check(_: Tensor) -> None:
            if len(batch["x"]) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory")

        x = batch["x"].clone().requires_grad_()
        x.register_hook(check)
        return Model.forward(self, batch | {"x": x})
