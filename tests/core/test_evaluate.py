import math
from collections.abc import Mapping

import numpy as np
import pytest
from fits import Bench, rows

from stagesweep.config import schema
from stagesweep.config.schema import Decay, Schedule, Weight

SGD = schema.Optimizer(_target_="torch.optim.SGD", lr=0.05, weight_decay=0.0)
CONSTANT = Schedule(decay=Decay.constant)


class TestEvaluation:
    def test_evaluation_runs_every_n_epochs_and_at_the_end(self, bench: "Bench") -> None:
        loop = bench.loop(epochs=7, eval_every=3)
        loop.run()
        assert ["val_loss" in row for row in rows(loop, "epoch")] == [
            False, False, True, False, False, True, True,
        ]  # fmt: skip

    def test_a_term_is_the_mean_over_the_split_without_noise(self, bench: "Bench") -> None:
        loop = bench.loop(loss={"error": Weight(), "masked": Weight()}, epochs=1)
        row = loop.run()
        batch = next(loop.val.batches(1000))
        outputs = loop.model.eval()(batch)
        distance = (outputs["x"] - batch["x"]).detach()
        mask = batch["x/mask"]
        assert row["val_error"] == pytest.approx(distance.square().sum(1).mean().item(), rel=1e-5)
        assert row["val_masked"] == pytest.approx(distance[mask].abs().mean().item(), rel=1e-5)

    def test_metrics_see_outputs_and_columns_of_the_whole_split(self, bench: "Bench") -> None:
        seen: dict[str, np.ndarray] = {}

        def metric(arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
            seen.update(arrays)
            return {"rows": float(len(arrays["index"])), "none": math.nan}

        loop = bench.loop(epochs=1, metrics={"mine": metric}, hardware={"micro_batch": 7})
        row = loop.run()
        assert row["val_rows"] == 30
        assert math.isnan(row["val_none"])
        assert seen["mean"].shape == (30, 3)
        batch = next(loop.val.batches(1000))
        for name in ("x", "x/mask", "weight"):
            assert np.array_equal(seen[f"input/{name}"], batch[name].numpy())
        # An output hides the column of its name, and no other.
        assert np.array_equal(seen["x/mask"], batch["x/mask"].numpy())
        decoded = loop.model.eval()(batch)["x"].detach().numpy()
        np.testing.assert_allclose(seen["x"], decoded, rtol=1e-5, atol=1e-6)
