import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import (
    WEIGHTS,
    Model,
    Small,
    by_hand,
    gradients,
    make_batch,
    make_step,
)
from torch import Tensor

from stagesweep.base.view import Batch
from stagesweep.config import schema
from stagesweep.hardware.profile import resolve
from stagesweep.parallel.micro_batches import split

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

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
    step = make_step(names, micro_batch=micro_batch)
    batch = make_batch(n)
    expected, pairs = by_hand(step, step.model(batch), batch)
    step.model.zero_grad()
    values = step.backward(batch, 0.0)
    tolerance = 1e-6 if precise else 1e-5
    torch.testing.assert_close(gradients(step.model), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(values.float(), pairs, rtol=1e-5, atol=1e-5)
    assert list(step.loss.terms) == sorted(
        step.loss.terms, key=lambda name: name in step.loss.whole_batch
    )


@pytest.mark.parametrize("micro_batch", [None, 1, 7, 16, 32])
def test_the_gradient_in_fp32_is_equal_to_1e_5(micro_batch: int | None) -> None:
    step = make_step(WEIGHTS, micro_batch=micro_batch, dtype=torch.float32)
    batch = make_batch(37, torch.float32)
    expected, _ = by_hand(step, step.model(batch), batch)
    step.model.zero_grad()
    step.backward(batch, 0.0)
    torch.testing.assert_close(gradients(step.model), expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(CHOICES), st.integers(4, 30), st.integers(1, 30))
def test_both_passes_have_the_same_dropout(names: list[str], n: int, micro_batch: int) -> None:
    step = make_step(names, micro_batch=micro_batch, dropout=0.5)
    batch = make_batch(n)
    torch.manual_seed(3)
    parts = [step.model(piece) for piece in split(batch, micro_batch)]
    outputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    after = torch.get_rng_state()
    expected, _ = by_hand(step, outputs, batch)
    step.model.zero_grad()
    torch.manual_seed(3)
    step.backward(batch, 0.0)
    torch.testing.assert_close(gradients(step.model), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_whole_batch_is_one_forward_pass() -> None:
    calls: list[int] = []
    model = Model(0.0).double()
    model.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0]["x"])))
    make_step(["square"], model=model, micro_batch=8).backward(make_batch(8), 0.0)
    assert calls == [8]
    make_step(["square"], model=model, micro_batch=3).backward(make_batch(8), 0.0)
    assert calls == [8, 3, 3, 2, 3, 3, 2]


def test_gradients_add_up_over_batches() -> None:
    step = make_step(["square"], micro_batch=3)
    step.backward(make_batch(8), 0.0)
    once = gradients(step.model).clone()
    step.backward(make_batch(8), 0.0)
    torch.testing.assert_close(gradients(step.model), 2 * once)


def test_unobserved_samples_have_zero_gradient_and_no_nan() -> None:
    batch = make_batch(6)
    batch["mask"].zero_()
    for micro_batch in (None, 4):
        step = make_step(["masked"], micro_batch=micro_batch)
        assert step.backward(batch, 0.0).tolist() == [[0.0, 0.0]]
        assert gradients(step.model).abs().sum() == 0


def test_out_of_memory_halves_the_micro_batch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    batch = make_batch(20)
    step = make_step(WEIGHTS, model=(torch.manual_seed(0), Small(6).double())[1])
    with caplog.at_level(logging.WARNING):
        step.backward(batch, 0.0)
    assert step.micro_batches.size == 5
    assert [record.message for record in caplog.records] == [
        "out of memory in step 0 (training): 10 samples at a time instead of 20",
        "out of memory in step 0 (training): 5 samples at a time instead of 10",
    ]
    whole = make_step(WEIGHTS)
    whole.backward(batch, 0.0)
    torch.testing.assert_close(gradients(step.model), gradients(whole.model), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_every_precision_gives_about_the_same_gradient(precision: str) -> None:
    hardware = resolve(
        schema.Hardware(device=schema.Device.cuda, precision=schema.Precision(precision))
    )
    batch = make_batch(32, torch.float32, "cuda")
    reference = make_step(WEIGHTS, dtype=torch.float32)
    cpu = {name: column.cpu() for name, column in batch.items()}
    expected, _ = by_hand(reference, reference.model(cpu), cpu)
    for micro_batch in (None, 9):
        step = make_step(WEIGHTS, hardware=hardware, dtype=torch.float32, micro_batch=micro_batch)
        step.backward(batch, 0.0)
        found = gradients(step.model).cpu() / step.scaler.get_scale()
        close = torch.nn.functional.cosine_similarity(found, expected, dim=0)
        assert close > (0.9999 if precision == "fp32" else 0.99)


@pytest.mark.gpu
@GPU
def test_on_a_gpu_both_passes_have_the_same_dropout() -> None:
    hardware = resolve(schema.Hardware(device=schema.Device.cuda, precision=schema.Precision.fp32))
    step = make_step(["square", "pairs"], hardware=hardware, micro_batch=4, dropout=0.5)
    batch = make_batch(10, device="cuda")
    torch.manual_seed(3)
    parts = [step.model(piece) for piece in split(batch, 4)]
    outputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    expected, _ = by_hand(step, outputs, batch)
    step.model.zero_grad()
    torch.manual_seed(3)
    step.backward(batch, 0.0)
    torch.testing.assert_close(gradients(step.model), expected, rtol=1e-6, atol=1e-6)


class Hungry(Model):
    """Takes gigabytes for each sample."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        free, _ = torch.cuda.mem_get_info()
        torch.empty(len(batch["x"]), free // 6, dtype=torch.uint8, device="cuda")
        return super().forward(batch)


@pytest.mark.gpu
@GPU
def test_out_of_memory_on_a_gpu_halves_the_micro_batch() -> None:
    hardware = resolve(schema.Hardware(device=schema.Device.cuda, precision=schema.Precision.fp32))
    step = make_step(["square"], hardware=hardware, model=Hungry(0.0).cuda().double())
    step.backward(make_batch(16, device="cuda"), 0.0)
    assert step.micro_batches.size in (2, 4)
