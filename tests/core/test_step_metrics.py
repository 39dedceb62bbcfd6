import math
from typing import Any

import pytest
from fits import Bench
from torch import Tensor, nn

from stagesweep.base.errors import UserError
from stagesweep.base.view import Batch
from stagesweep.config import schema
from stagesweep.config.schema import Decay, Schedule, Weight
from stagesweep.core import checkpoint

SGD = schema.Optimizer(_target_="torch.optim.SGD", lr=0.05, weight_decay=0.0)
CONSTANT = Schedule(decay=Decay.constant)


class TestNaN:
    @pytest.mark.parametrize(("log_every", "at"), [(1, 3), (50, 3), (50, 7), (4, 10)])
    def test_the_error_names_term_epoch_and_step(
        self, bench: "Bench", log_every: int, at: int
    ) -> None:
        class Bad(nn.Module):
            count = 0

            def forward(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
                self.count += 1
                worth = math.nan if self.count == at else 1.0
                return outputs["x"].sum() * worth, batch["x"].new_tensor(len(batch["x"]))

        error = bench.loop().loss.terms["error"]
        loop = bench.loop(
            name="nan",
            terms={"error": error, "bad": Bad()},
            loss={"error": Weight(), "bad": Weight()},
            log_every=log_every,
            eval_every=100,
        )
        with pytest.raises(UserError) as caught:
            loop.run()
        assert str(caught.value) == (
            f"fit: loss term 'bad' became nan in epoch {(at - 1) // 5 + 1}, step {at}; lower "
            "stage.fit.optimizer.lr, set stage.fit.clip_norm or use hardware.precision=fp32"
        )

    def test_a_nan_gradient_is_found_at_its_step(self, bench: "Bench") -> None:
        class Root(nn.Module):
            def forward(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
                zero = outputs["x"].square().sum() * 0
                return zero.sqrt(), batch["x"].new_tensor(len(batch["x"]))

        loop = bench.loop(terms={"root": Root()}, loss={"root": Weight()})
        with pytest.raises(UserError, match=r"^fit: the gradient became nan in epoch 1, step 1; "):
            loop.run()
        assert checkpoint.load_newest(loop.checkpoints.folder) is None

    def test_divergence(self, bench: "Bench") -> None:
        loop = bench.loop(
            epochs=200,
            clip_norm=None,
            schedule=CONSTANT,
            optimizer=schema.Optimizer(_target_="torch.optim.SGD", lr=1e4),
        )
        with pytest.raises(UserError, match=r"became (nan|inf|-inf) in epoch \d+, step \d+; lower"):
            loop.run()
