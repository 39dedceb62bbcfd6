from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from steps import CPU, Model, make_batch, make_step
from torch import Tensor

from stagesweep.base.errors import UserError
from stagesweep.base.view import Batch
from stagesweep.config import schema
from stagesweep.core.predict import predict

if TYPE_CHECKING:
    from fits import Bench


def test_predict_gives_outputs_and_columns_by_name(bench: "Bench") -> None:
    loop = bench.loop(hardware={"micro_batch": 7})
    loop.model.train()
    found = predict(loop.model, loop.val, ["x", "input/x", "weight", "mean"], loop.hardware)
    batch = next(loop.val.batches(1000))
    assert found.keys() == {"x", "input/x", "weight", "mean"}
    assert torch.equal(found["input/x"], batch["x"])
    torch.testing.assert_close(found["x"], loop.model.eval()(batch)["x"].detach())
    assert not found["mean"].requires_grad
    assert not found["mean"].is_inference()
    everything = predict(loop.model, loop.val, None, loop.hardware)
    assert everything.keys() == {"x", "mean"}


def test_predict_leaves_the_model_in_its_mode(bench: "Bench") -> None:
    loop = bench.loop()
    for training in (True, False):
        loop.model.train(training)
        predict(loop.model, loop.val, ["mean"], loop.hardware)
        assert loop.model.training is training


def test_an_unknown_name_lists_all_names(bench: "Bench") -> None:
    loop = bench.loop()
    with pytest.raises(UserError) as caught:
        predict(loop.model, loop.val, ["latent"], loop.hardware)
    assert str(caught.value) == (
        "the model gives no 'latent' and the data has no such column; there are index, mean, "
        "weight, x, x/mask"
    )


def test_bf16_reaches_the_model_and_the_terms_get_fp32() -> None:
    seen: dict[str, Any] = {}

    class Looks(Model):
        def forward(self, batch: Batch) -> dict[str, Tensor]:
            outputs = super().forward(batch)
            seen.update({name: value.dtype for name, value in outputs.items()})
            return outputs

    hardware = replace(CPU, precision=schema.Precision.bf16, autocast=torch.bfloat16)
    torch.manual_seed(0)
    step = make_step(["square"], hardware=hardware, model=Looks(0.0))
    outputs = step.forward(make_batch(4, torch.float32))
    assert seen["mean"] is torch.bfloat16
    assert outputs["mean"].dtype is torch.float32
