import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fits import (
    At,
    Bench,
    Everything,
    Make,
    Scripted,
    curve,
    identical,
    rows,
    same,
    terminate,
    weights,
)
from torch import Tensor, nn

from stagesweep.base import signals
from stagesweep.base.errors import Interrupted, UserError
from stagesweep.base.view import Batch, View
from stagesweep.config import schema
from stagesweep.config.schema import Decay, EarlyStop, Mode, Schedule, Weight
from stagesweep.core import checkpoint
from stagesweep.core.fit import Loop

SGD = schema.Optimizer(_target_="torch.optim.SGD", lr=0.05, weight_decay=0.0)
CONSTANT = Schedule(decay=Decay.constant)


class TestBest:
    def test_several_best_checkpoints_and_the_selected_weights(self, bench: "Bench") -> None:
        history: list[dict[str, Tensor]] = []
        low, high = Scripted("low", [3, 1, 2, 4]), Scripted("high", [1, 2, 9, 4])
        loop = bench.loop(
            epochs=4,
            metrics={"low": low, "high": high},
            best={"val_low": Mode.min, "val_high": Mode.max},
            select="val_high",
        )
        evaluate = loop.evaluate

        def remembering() -> dict[str, float]:
            history.append(weights(loop.model))
            return evaluate()

        loop.evaluate = remembering  # type: ignore[method-assign]
        loop.run()
        for name, epoch in (("val_low", 2), ("val_high", 3)):
            state = checkpoint.load(loop.checkpoints.folder / f"best_{name}.pt")["model"]
            assert same(state, history[epoch - 1]), name
        assert same(weights(loop.model), history[2])

    @pytest.mark.parametrize("ema", [None, 0.5])
    def test_metrics_are_those_of_the_selected_weights(
        self, bench: "Bench", ema: float | None
    ) -> None:
        loop = bench.loop(
            epochs=5,
            ema=ema,
            metrics={"score": Scripted("score", [3, 1, 9, 4, 2])},
            best={"val_score": Mode.max},
            select="val_score",
        )
        result = loop.run()
        batch = next(loop.val.batches(1000))
        error = (loop.model.eval()(batch)["x"] - batch["x"]).square().sum(1).mean().item()
        assert result["val_error"] == pytest.approx(error, rel=1e-5)
        assert error != pytest.approx(curve(loop, "val_error")[-1], rel=1e-5)
        assert result["val_score"] == 9
        third = rows(loop, "epoch")[2]
        assert result == {name: third[name] for name in result if name != "epochs"} | {"epochs": 5}

    def test_metrics_first_measured_later_are_nan(self, bench: "Bench") -> None:
        class Late(nn.Module):
            def refresh(self, epoch: int, predict: Any) -> dict[str, float]:
                return {"late": float(epoch)} if epoch > 1 else {}

            def forward(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
                return outputs["x"].sum() * 0, batch["x"].new_tensor(len(batch["x"]))

        for best, late in ((1, math.nan), (3, 2.0)):
            loop = bench.loop(
                name=f"{best}",
                epochs=4,
                terms={"error": bench.loop().loss.terms["error"], "late": Late()},
                loss={"error": Weight(), "late": Weight()},
                metrics={"s": Scripted("s", [float(n == best) for n in range(1, 5)])},
                best={"val_s": Mode.max},
                select="val_s",
            )
            assert loop.run()["late"] == pytest.approx(late, nan_ok=True)

    def test_a_metric_that_was_never_finite(self, bench: "Bench") -> None:
        score = Scripted("score", [math.nan] * 3)
        loop = bench.loop(metrics={"s": score}, best={"val_score": Mode.max}, select="val_score")
        with pytest.raises(UserError) as caught:
            loop.run()
        assert str(caught.value) == "stage.fit.select=val_score: the metric was never finite"

    def test_select_last_keeps_the_last_weights(self, bench: "Bench") -> None:
        loop = bench.loop(best={"val_loss": Mode.max})
        loop.run()
        last = checkpoint.load(loop.checkpoints.folder / "last.pt")
        assert same(weights(loop.model), last["model"])
        assert last["values"]["epoch"] == 3

    def test_an_unknown_metric(self, bench: "Bench") -> None:
        with pytest.raises(UserError) as caught:
            bench.loop(best={"val_acc": Mode.max}).run()
        assert str(caught.value) == (
            "stage.fit.best: no metric 'val_acc'; there are train_loss, train_error, lr, val_loss, "
            "val_error"
        )


class TestCheckpoints:
    def saved(self, loop: Loop) -> list[int]:
        return sorted(
            int(path.stem.removeprefix("step_")) for path in loop.checkpoints.folder.glob("step_*")
        )

    @pytest.mark.parametrize(
        ("every", "keep", "expected"),
        [(1, 1, [35]), (1, 3, [25, 30, 35]), (2, 9, [10, 20, 30, 35]), (9, 9, [35])],
    )
    def test_checkpoints_every_n_epochs_and_only_the_last_are_kept(
        self, bench: "Bench", every: int, keep: int, expected: list[int]
    ) -> None:
        loop = bench.loop(epochs=7, save_every=every, keep_last=keep)
        loop.run()
        assert self.saved(loop) == expected

    def test_no_checkpoint_within_save_seconds(self, bench: "Bench") -> None:
        loop = bench.loop(epochs=7, keep_last=9, save_seconds=1000)
        loop.run()
        assert self.saved(loop) == [35]

    def test_numpy_numbers_are_saved_in_a_checkpoint(self, bench: "Bench") -> None:
        def metric(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
            return {"spread": arrays["mean"].std(), "rank": np.float64(2)}

        first, again = (
            bench.loop(metrics={"mine": metric}, best={"val_spread": Mode.max}) for _ in range(2)
        )
        assert first.run() == again.run()

    def test_nothing_is_trained_twice(self, bench: "Bench", tiny: Make) -> None:
        first = bench.loop(model=tiny(), epochs=4)
        result = first.run()
        again = bench.loop(model=tiny(), epochs=4, augment=At(1, do=lambda: pytest.fail("step")))
        assert again.run() == result
        assert same(weights(first.model), weights(again.model))
        assert len(rows(again, "epoch")) == 4

    def test_a_truncated_checkpoint_falls_back_to_the_previous_one(
        self, bench: "Bench", tiny: Make, caplog: pytest.LogCaptureFixture
    ) -> None:
        whole = bench.loop(name="whole", model=tiny(), epochs=4)
        whole.run()
        bench.loop(model=tiny(), epochs=2, keep_last=2, schedule=CONSTANT).run()
        first = bench.loop(name="first", model=tiny(), epochs=4, keep_last=2, augment=None)
        first.settings.epochs = 4
        first.run()
        newest = first.checkpoints.folder / "step_000000020.pt"
        os.truncate(newest, newest.stat().st_size // 2)
        again = bench.loop(name="first", model=tiny(), epochs=4, keep_last=2)
        again.run()
        assert any("falling back to step_000000015.pt" in r.message for r in caplog.records)
        assert same(weights(again.model), weights(whole.model))
        assert rows(again) == rows(whole)


class Killed(Exception):
    """Stands for SIGKILL: nothing is saved."""


def kill() -> None:
    raise Killed


def by_weight(view: View, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """A sampler: heavy samples come often."""
    rows = torch.multinomial(view["weight"], len(view), replacement=True, generator=generator)
    return iter(rows.split(size))


# Steps at which a piece of the fit ends: inside, at the last of an epoch, at the very last.
PIECES = [(1,), (3,), (5,), (10,), (24,), (25,), (6, 1, 1, 4), (5, 5, 5), (2, 20, 3)]


@pytest.fixture(scope="module")
def undisturbed(
    open_bench: "Callable[[Path], Bench]", tiny: Make, tmp_path_factory: pytest.TempPathFactory
) -> list[Any]:
    """The outcome of the fit in one go."""
    bench = open_bench(tmp_path_factory.mktemp("undisturbed"))
    everything = Everything(bench, tiny)
    loop = everything.loop("fit")
    outcome = everything.outcome(loop, loop.run())
    bench.close()
    return outcome


class TestResuming:
    @pytest.fixture
    def everything(self, bench: "Bench", tiny: Make) -> Everything:
        return Everything(bench, tiny)

    def in_pieces(
        self, everything: Everything, pieces: tuple[int, ...], **settings: Any
    ) -> list[Any]:
        """The outcome of a fit that SIGTERM stopped after each piece."""
        done = 0
        for steps in pieces:
            loop = everything.loop("stopped", At(steps, do=terminate), **settings)
            with pytest.raises(Interrupted), signals.handled():
                loop.run()
            done += steps
            assert loop.state.step == done
        loop = everything.loop("stopped", **settings)
        outcome = everything.outcome(loop, loop.run())
        assert len({(r["kind"], r["epoch"], r["step"]) for r in rows(loop)}) == len(rows(loop))
        return outcome

    @pytest.mark.parametrize("pieces", PIECES, ids=str)
    def test_a_fit_stopped_at_any_step_ends_with_the_same_bits(
        self, everything: Everything, undisturbed: list[Any], pieces: tuple[int, ...]
    ) -> None:
        assert identical(self.in_pieces(everything, pieces), undisturbed)

    @pytest.mark.parametrize(
        "settings",
        [
            {"hardware": {"micro_batch": 4}},
            {"sampler": by_weight},
            {"best": {"lr": Mode.max}, "select": "lr"},
        ],
        ids=["micro-batches", "sampler", "early best"],
    )
    def test_a_stopped_fit_with_other_settings_ends_with_the_same_bits(
        self, everything: Everything, settings: dict[str, Any]
    ) -> None:
        loop = everything.loop("undisturbed", **settings)
        expected = everything.outcome(loop, loop.run())
        assert identical(self.in_pieces(everything, (6, 1, 8), **settings), expected)

    @pytest.mark.parametrize("pieces", PIECES, ids=str)
    def test_a_fit_killed_at_any_step_ends_with_the_same_bits(
        self, everything: Everything, undisturbed: list[Any], pieces: tuple[int, ...]
    ) -> None:
        for number, steps in enumerate(pieces):
            loop = everything.loop("killed", At(steps, do=kill), save_every=1 + number)
            with pytest.raises(Killed):
                loop.run()
            loop.rows.stream.write('{"stage": "fit", "kind": "st')
            loop.rows.close()
        loop = everything.loop("killed")
        assert identical(everything.outcome(loop, loop.run()), undisturbed)

    def test_a_signal_after_the_last_step_loses_nothing(
        self, everything: Everything, undisturbed: list[Any]
    ) -> None:
        loop = everything.loop("late")
        evaluate = loop.evaluate

        def interrupted() -> dict[str, float]:
            if loop.state.epoch == loop.settings.epochs:
                terminate()
            return evaluate()

        loop.evaluate = interrupted  # type: ignore[method-assign]
        with pytest.raises(Interrupted), signals.handled():
            loop.run()
        again = everything.loop("late", At(1, do=lambda: pytest.fail("trained again")))
        assert identical(everything.outcome(again, again.run()), undisturbed)

    def test_a_resumed_fit_logs_epoch_and_step(
        self, everything: Everything, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(Interrupted) as caught, signals.handled():
            everything.loop("said", At(7, do=terminate)).run()
        assert caught.value.exit_code == 143
        everything.loop("said").run()
        assert "fit: resuming from epoch 1, step 7" in [r.message for r in caplog.records]

    def test_a_stopped_fit_stays_stopped(self, bench: "Bench") -> None:
        rule = {"train_loss": EarlyStop(target=1e9)}
        first = bench.loop(early_stop=rule)
        second = bench.loop(early_stop=rule)
        assert first.run() == second.run()
        assert second.state.epoch == 1
