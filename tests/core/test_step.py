import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stagesweep.base.view import Batch
from stagesweep.config import schema
from stagesweep.core.step import WeightedLoss, split
from stagesweep.hardware.profile import Machine, resolve
from stagesweep.loss.alignment import Alignment
from stagesweep.loss.supervised_contrastive import SupervisedContrastive
from stagesweep.parallel.process_group import ALONE, Team

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
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


def make_loss(
    names: Iterable[str],
    *,
    micro_batch: int | None = None,
    dropout: float = 0.0,
    machine: Machine = CPU,
    dtype: torch.dtype = torch.float64,
    weights: Mapping[str, schema.Weight] | None = None,
    model: nn.Module | None = None,
    team: Team = ALONE,
) -> WeightedLoss:
    torch.manual_seed(0)
    model = model or Model(dropout).to(machine.device, dtype)
    return WeightedLoss(
        model,
        TERMS,
        weights or {name: schema.Weight(WEIGHTS[name]) for name in names},
        replace(machine, micro_batch=micro_batch),
        torch.amp.GradScaler(
            machine.device.type, enabled=machine.precision is schema.Precision.fp16
        ),
        team,
    )


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def by_hand(loss: WeightedLoss, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    """Gradient of sum(w * total / weight) over the undivided batch, and (total, weight)."""
    loss.model.zero_grad()
    pairs = {name: TERMS[name](outputs, batch) for name in loss.terms}
    sum(
        loss.weights[name].weight * total / weight
        for name, (total, weight) in pairs.items()
        if weight > 0
    ).backward()
    return gradients(loss.model), torch.tensor([[t.item(), w.item()] for t, w in pairs.values()])


CHOICES = [
    ["square"],
    ["masked"],
    ["square", "masked"],
    ["pairs"],
    ["pairs", "square"],
    ["square", "pairs", "masked"],
    ["contrastive", "consistency"],
    list(WEIGHTS),
]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(CHOICES), st.integers(4, 40), st.integers(1, 45))
def test_the_gradient_does_not_depend_on_the_micro_batch(
    names: list[str], n: int, micro_batch: int
) -> None:
    # Contrastive and consistency compute in fp32 whatever the model does.
    precise = not {"contrastive", "consistency"} & set(names)
    loss = make_loss(names, micro_batch=micro_batch)
    batch = make_batch(n)
    expected, pairs = by_hand(loss, loss.model(batch), batch)
    loss.model.zero_grad()
    values = loss.backward(batch, 0.0)
    tolerance = 1e-6 if precise else 1e-5
    torch.testing.assert_close(gradients(loss.model), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(values.float(), pairs, rtol=1e-5, atol=1e-5)
    assert list(loss.terms) == sorted(loss.terms, key=lambda name: name in loss.whole)


@pytest.mark.parametrize("micro_batch", [None, 1, 7, 16, 32])
def test_in_fp32_to_1e_5(micro_batch: int | None) -> None:
    loss = make_loss(WEIGHTS, micro_batch=micro_batch, dtype=torch.float32)
    batch = make_batch(37, torch.float32)
    expected, _ = by_hand(loss, loss.model(batch), batch)
    loss.model.zero_grad()
    loss.backward(batch, 0.0)
    torch.testing.assert_close(gradients(loss.model), expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(CHOICES), st.integers(4, 30), st.integers(1, 30))
def test_both_passes_drop_the_same(names: list[str], n: int, micro_batch: int) -> None:
    loss = make_loss(names, micro_batch=micro_batch, dropout=0.5)
    batch = make_batch(n)
    torch.manual_seed(3)
    parts = [loss.model(piece) for piece in split(batch, micro_batch)]
    outputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    after = torch.get_rng_state()
    expected, _ = by_hand(loss, outputs, batch)
    loss.model.zero_grad()
    torch.manual_seed(3)
    loss.backward(batch, 0.0)
    torch.testing.assert_close(gradients(loss.model), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_whole_batch_is_one_forward_pass() -> None:
    calls: list[int] = []
    model = Model(0.0).double()
    model.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0]["x"])))
    make_loss(["square"], model=model, micro_batch=8).backward(make_batch(8), 0.0)
    assert calls == [8]
    make_loss(["square"], model=model, micro_batch=3).backward(make_batch(8), 0.0)
    assert calls == [8, 3, 3, 2, 3, 3, 2]


def test_gradients_add_up_over_batches() -> None:
    loss = make_loss(["square"], micro_batch=3)
    loss.backward(make_batch(8), 0.0)
    once = gradients(loss.model).clone()
    loss.backward(make_batch(8), 0.0)
    torch.testing.assert_close(gradients(loss.model), 2 * once)


def test_nothing_observed_gives_no_gradient_and_no_nan() -> None:
    batch = make_batch(6)
    batch["mask"].zero_()
    for micro_batch in (None, 4):
        loss = make_loss(["masked"], micro_batch=micro_batch)
        assert loss.backward(batch, 0.0).tolist() == [[0.0, 0.0]]
        assert gradients(loss.model).abs().sum() == 0


def test_terms_of_weight_zero_are_not_computed() -> None:
    weights = {"square": schema.Weight(1.0), "contrastive": schema.Weight(0.0)}
    assert list(make_loss([], weights=weights).terms) == ["square"]


@pytest.mark.parametrize(
    ("position", "expected"), [(0.0, [0.0, 0.5]), (1.0, [0.75, 0.5]), (4, [3, 0.5]), (9, [3, 0.5])]
)
def test_ramps_rise_from_zero(position: float, expected: list[float]) -> None:
    weights = {"square": schema.Weight(3.0, ramp=4.0), "masked": schema.Weight(0.5)}
    loss = make_loss([], weights=weights)
    assert loss.factors(position).tolist() == pytest.approx(expected)
    batch = make_batch(8)
    loss.backward(batch, position)
    full = make_loss(
        [],
        weights={n: schema.Weight(w) for n, w in zip(weights, expected, strict=True) if w},
    )
    full.backward(batch, 0.0)
    torch.testing.assert_close(gradients(loss.model), gradients(full.model))


class Small(Model):
    """Stands for a GPU that holds so many samples."""

    def __init__(self, room: int) -> None:
        super().__init__(0.0)
        self.room = room

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if len(batch["x"]) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(batch)


class SmallAtTheEnd(Small):
    """The memory is gone when most of the backward pass is done."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        def check(_: Tensor) -> None:
            if len(batch["x"]) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory")

        x = batch["x"].clone().requires_grad_()
        x.register_hook(check)
        return Model.forward(self, batch | {"x": x})


def test_out_of_memory_goes_on_with_half_the_micro_batch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    batch = make_batch(20)
    loss = make_loss(WEIGHTS, model=(torch.manual_seed(0), Small(6).double())[1])
    with caplog.at_level(logging.WARNING):
        loss.backward(batch, 0.0)
    assert loss.micro_batch == 5
    assert [record.message for record in caplog.records] == [
        "out of memory in step 0 (training): 10 samples at a time instead of 20",
        "out of memory in step 0 (training): 5 samples at a time instead of 10",
    ]
    whole = make_loss(WEIGHTS)
    whole.backward(batch, 0.0)
    torch.testing.assert_close(gradients(loss.model), gradients(whole.model), rtol=1e-5, atol=1e-5)


def test_bf16_reaches_the_model_and_the_terms_get_fp32() -> None:
    seen: dict[str, Any] = {}

    class Looks(Model):
        def forward(self, batch: Batch) -> dict[str, Tensor]:
            outputs = super().forward(batch)
            seen.update({name: value.dtype for name, value in outputs.items()})
            return outputs

    machine = replace(CPU, precision=schema.Precision.bf16, autocast=torch.bfloat16)
    torch.manual_seed(0)
    loss = make_loss(["square"], machine=machine, model=Looks(0.0))
    outputs = loss.forward(loss.model, make_batch(4, torch.float32))
    assert seen["mean"] is torch.bfloat16
    assert outputs["mean"].dtype is torch.float32


def test_terms_are_computed_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Looks(Square):
        def forward(self, *given: Any) -> tuple[Tensor, Tensor]:
            seen.append(torch.get_float32_matmul_precision())
            return super().forward(*given)

    monkeypatch.setitem(TERMS, "square", Looks())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for micro_batch in (None, 4):
            make_loss(["square"], micro_batch=micro_batch).backward(make_batch(8), 0.0)
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_every_precision_gives_about_the_same_gradient(precision: str) -> None:
    machine = resolve(
        schema.Hardware(device=schema.Device.cuda, precision=schema.Precision(precision))
    )
    batch = make_batch(32, torch.float32, "cuda")
    reference = make_loss(WEIGHTS, dtype=torch.float32)
    cpu = {name: column.cpu() for name, column in batch.items()}
    expected, _ = by_hand(reference, reference.model(cpu), cpu)
    for micro_batch in (None, 9):
        loss = make_loss(WEIGHTS, machine=machine, dtype=torch.float32, micro_batch=micro_batch)
        loss.backward(batch, 0.0)
        found = gradients(loss.model).cpu() / loss.scaler.get_scale()
        close = torch.nn.functional.cosine_similarity(found, expected, dim=0)
        assert close > (0.9999 if precision == "fp32" else 0.99)


@pytest.mark.gpu
@GPU
def test_on_a_gpu_both_passes_drop_the_same() -> None:
    machine = resolve(schema.Hardware(device=schema.Device.cuda, precision=schema.Precision.fp32))
    loss = make_loss(["square", "pairs"], machine=machine, micro_batch=4, dropout=0.5)
    batch = make_batch(10, device="cuda")
    torch.manual_seed(3)
    parts = [loss.model(piece) for piece in split(batch, 4)]
    outputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    expected, _ = by_hand(loss, outputs, batch)
    loss.model.zero_grad()
    torch.manual_seed(3)
    loss.backward(batch, 0.0)
    torch.testing.assert_close(gradients(loss.model), expected, rtol=1e-6, atol=1e-6)


class Hungry(Model):
    """Takes gigabytes for each sample."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        free, _ = torch.cuda.mem_get_info()
        torch.empty(len(batch["x"]), free // 6, dtype=torch.uint8, device="cuda")
        return super().forward(batch)


@pytest.mark.gpu
@GPU
def test_on_a_gpu_that_is_full_the_step_is_taken_in_parts() -> None:
    machine = resolve(schema.Hardware(device=schema.Device.cuda, precision=schema.Precision.fp32))
    loss = make_loss(["square"], machine=machine, model=Hungry(0.0).cuda().double())
    loss.backward(make_batch(16, device="cuda"), 0.0)
    assert loss.micro_batch in (2, 4)
