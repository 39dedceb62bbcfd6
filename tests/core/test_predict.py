from typing import TYPE_CHECKING

import pytest
import torch

from stagesweep.base.errors import UserError
from stagesweep.core.predict import predict

if TYPE_CHECKING:
    from conftest import Bench


def test_predict_gives_outputs_and_columns_by_name(bench: "Bench") -> None:
    loop = bench.loop(hardware={"micro_batch": 7})
    loop.model.train()
    found = predict(loop.model, loop.val, ["x", "input/x", "weight", "mean"], loop.machine)
    batch = next(loop.val.batches(1000))
    assert found.keys() == {"x", "input/x", "weight", "mean"}
    assert torch.equal(found["input/x"], batch["x"])
    torch.testing.assert_close(found["x"], loop.model.eval()(batch)["x"].detach())
    assert not found["mean"].requires_grad
    assert not found["mean"].is_inference()
    everything = predict(loop.model, loop.val, None, loop.machine)
    assert everything.keys() == {"x", "mean"}


def test_predict_leaves_the_model_in_its_mode(bench: "Bench") -> None:
    loop = bench.loop()
    for training in (True, False):
        loop.model.train(training)
        predict(loop.model, loop.val, ["mean"], loop.machine)
        assert loop.model.training is training


def test_predict_lists_what_there_is(bench: "Bench") -> None:
    loop = bench.loop()
    with pytest.raises(UserError) as caught:
        predict(loop.model, loop.val, ["latent"], loop.machine)
    assert str(caught.value) == (
        "the model gives no 'latent' and the data has no such column; there are index, mean, "
        "weight, x, x/mask"
    )
