import fcntl
import logging
import math
import os
import re
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from torch import Tensor, nn

from stagesweep.base import signals
from stagesweep.base.errors import Interrupted, UserError
from stagesweep.base.spec import Spec
from stagesweep.base.view import Batch, View
from stagesweep.config import schema
from stagesweep.config.schema import Decay, EarlyStop, Mode, Precision, Schedule, Weight
from stagesweep.core import checkpoint
from stagesweep.core.fit import Loop
from stagesweep.core.optim import learning_rate
from stagesweep.data.loader import LoaderView
from stagesweep.hardware.throughput import SPEED
from stagesweep.stage.fit import Fit
from stagesweep.store.metric_log import MetricLog
from stagesweep.store.tensorboard import read_rows

if TYPE_CHECKING:
    from fits import Bench

Columns = Callable[..., Batch]
Make = Callable[..., nn.Module]
Augment = Callable[[Batch, Spec, torch.Generator], Batch]

SGD = schema.Optimizer(_target_="torch.optim.SGD", lr=0.05, weight_decay=0.0)
CONSTANT = Schedule(decay=Decay.constant)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


def rows(loop: Loop, kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of a fit, without the numbers that are no result."""
    found = [
        {name: value for name, value in row.items() if name not in SPEED}
        for row in read_rows(loop.rows.path)
    ]
    return [row for row in found if kind in (None, row["kind"])]


def curve(loop: Loop, name: str) -> list[float]:
    return [row[name] for row in rows(loop, "epoch") if name in row]


class Scripted:
    """A metric whose values are known beforehand, one for each evaluation."""

    def __init__(self, name: str, values: list[float]) -> None:
        self.name, self.values = name, iter(values)

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
        return {self.name: next(self.values)}


class At:
    """An augmentation that adds random columns, and does something at chosen steps."""

    def __init__(self, *steps: int, do: Callable[[], None] = lambda: None) -> None:
        self.steps, self.do, self.count = steps, do, 0

    def __call__(self, batch: Batch, spec: Spec, generator: torch.Generator) -> Batch:
        self.count += 1
        if self.count in self.steps:
            self.do()
        noise = torch.randn(batch["x"].shape, generator=generator, device=generator.device)
        return {"x": batch["x"] + 0.01 * noise}


class TestTraining:
    def test_it_is_the_loop_one_writes_by_hand(
        self, bench: "Bench", tiny: Make, make_batch: Columns
    ) -> None:
        schedule = Schedule(warmup=1.0, min_lr=0.001)
        loop = bench.loop(
            optimizer=SGD, schedule=schedule, clip_norm=0.5, model=tiny(), epochs=3, batch_size=10
        )
        noise = torch.Generator()
        noise.set_state(loop.state.noise.get_state())
        model, train = tiny(), make_batch()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for epoch in range(3):
            loop.state.epoch = epoch
            order = loop.batches.order(loop.state.epoch)
            total = 0.0
            for number, index in enumerate(order):
                batch = {name: column[index] for name, column in train.items()}
                batch["noise"] = torch.randn(len(index), 3, generator=noise)
                loss = (model(batch)["x"] - batch["x"]).square().sum(1).mean()
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(0.05, epoch + number / len(order), 3, schedule)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                total += loss.item() * len(index)
            losses.append(total / len(train["x"]))
        loop.state.epoch = 0
        result = loop.run()
        for name, value in loop.model.state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-5, atol=1e-6)
        assert curve(loop, "train_error") == pytest.approx(losses, rel=1e-5)
        assert result["train_error"] == pytest.approx(losses[-1], rel=1e-5)
        assert result["epochs"] == 3

    def test_every_sample_once_an_epoch_in_another_order(self, bench: "Bench") -> None:
        loop = bench.loop()
        first = loop.batches.order(loop.state.epoch)
        loop.state.epoch = 1
        second = loop.batches.order(loop.state.epoch)
        for order in (first, second):
            assert [len(batch) for batch in order] == [10, 10, 10, 10, 4]
            assert torch.cat(order).sort().values.tolist() == list(range(44))
        assert torch.cat(first).tolist() != torch.cat(second).tolist()

    def test_the_same_seed_gives_the_same_bits(self, bench: "Bench", tiny: Make) -> None:
        found = []
        for name in ("one", "two"):
            torch.rand(3)  # whatever was drawn before
            loop = bench.loop(name=name, model=tiny(dropout=0.2), loss={"chance": Weight()})
            loop.run()
            found.append((weights(loop.model), rows(loop)))
        assert same(found[0][0], found[1][0])
        assert found[0][1] == found[1][1]

    @pytest.mark.parametrize("micro_batch", [1, 3, 8])
    def test_accumulation_gives_the_same_loss_curve(self, bench: "Bench", micro_batch: int) -> None:
        loss = {name: Weight(0.5) for name in ("error", "masked", "spread", "anchored")}
        whole = bench.loop(name="whole", loss=loss, epochs=4)
        parts = bench.loop(name="parts", loss=loss, epochs=4, hardware={"micro_batch": micro_batch})
        one, other = whole.run(), parts.run()
        assert one.keys() == other.keys()
        for name in ("train_loss", "val_loss", *(f"train_{term}" for term in loss)):
            assert curve(parts, name) == pytest.approx(curve(whole, name), rel=1e-5), name
        for name, value in whole.model.state_dict().items():
            torch.testing.assert_close(parts.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)

    def test_bf16_stays_close(self, bench: "Bench") -> None:
        fp32, bf16 = (
            bench.loop(name=p, epochs=4, hardware={"precision": Precision(p)}).run()
            for p in ("fp32", "bf16")
        )
        assert bf16["val_loss"] != fp32["val_loss"]
        assert bf16["val_loss"] == pytest.approx(fp32["val_loss"], rel=0.02)

    def test_compiled_it_learns_the_same(
        self, bench: "Bench", monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compile_ = torch.compile  # without a C++ compiler: capture and run
        monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend="eager"))
        plain = bench.loop(name="plain").run()
        compiled = bench.loop(name="compiled", hardware={"compile": True})
        found = compiled.run()
        assert found["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-5)
        assert not any("_orig_mod" in name for name in compiled.model.state_dict())

    def test_through_the_loader_it_learns_the_same(
        self, bench: "Bench", make_batch: Columns
    ) -> None:
        batch = make_batch()

        class Rows:
            def __len__(self) -> int:
                return len(batch["x"])

            def __getitem__(self, index: int) -> dict[str, Tensor]:
                return {name: batch[name][index] for name in ("x", "x/mask", "weight")}

        memory = bench.loop(name="memory", loss={"chance": Weight(), "masked": Weight()})
        loader = bench.loop(
            name="loader",
            loss={"chance": Weight(), "masked": Weight()},
            train=LoaderView(Rows()),
            val=LoaderView(Rows()),
        )
        memory.run()
        loader.run()
        assert same(weights(memory.model), weights(loader.model))

    def test_frozen_parts_stay_and_groups_have_their_rates(
        self, bench: "Bench", tiny: Make
    ) -> None:
        settings = schema.Optimizer(lr=0.01, groups={"decoder.*": schema.Group(lr=0.02)})
        loop = bench.loop(
            model=tiny(norm=True, dropout=0.5),
            freeze=["encoder.*", "norm.*"],
            optimizer=settings,
            schedule=CONSTANT,
            log_every=1,
        )
        before = weights(loop.model)
        loop.run()
        after = weights(loop.model)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"latent.weight", "latent.bias", "decoder.weight", "decoder.bias"}
        (row, *_) = rows(loop, "step")
        assert (row["lr_default"], row["lr_decoder.*"]) == (0.01, 0.02)

    def test_a_term_that_rises_reports_its_full_weight(self, bench: "Bench") -> None:
        loss = {"error": Weight(1.0), "masked": Weight(2.0, ramp=100)}
        loop = bench.loop(loss=loss, epochs=1)
        row = loop.run()
        assert row["train_loss"] == pytest.approx(row["train_error"] + 2 * row["train_masked"])
        assert row["val_loss"] == pytest.approx(row["val_error"] + 2 * row["val_masked"])

    def test_a_whole_batch_term_alone(self, bench: "Bench") -> None:
        for micro_batch in (None, 4):
            loop = bench.loop(
                name=f"{micro_batch}",
                loss={"spread": Weight()},
                hardware={"micro_batch": micro_batch},
            )
            row = loop.run()
            assert "val_spread" not in row
            assert math.isfinite(row["train_spread"])

    def test_refresh_metrics_are_rows_and_terms_keep_their_state(self, bench: "Bench") -> None:
        loop = bench.loop(loss={"error": Weight(), "anchored": Weight(0.1)}, epochs=4)
        result = loop.run()
        assert ["moved" in row for row in rows(loop, "epoch")] == [True, False, True, False]
        assert result["moved"] == rows(loop, "epoch")[2]["moved"]

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_an_empty_split(self, bench: "Bench", make_batch: Columns, split: str) -> None:
        empty = View({"x": torch.zeros(0, 6)})
        views = {"train": View(make_batch()), "val": View(make_batch()), split: empty}
        with pytest.raises(UserError, match=f"^fit: the {split} split has no samples"):
            bench.loop(train=views["train"], val=views["val"])


class TestNaN:
    @pytest.mark.parametrize(("log_every", "at"), [(1, 3), (50, 3), (50, 7), (4, 10)])
    def test_it_names_the_term_the_epoch_and_the_step(
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

    def test_a_gradient_that_is_not_a_number_is_found_where_it_arises(self, bench: "Bench") -> None:
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


class TestEvaluation:
    def test_every_so_many_epochs_and_at_the_end(self, bench: "Bench") -> None:
        loop = bench.loop(epochs=7, eval_every=3)
        loop.run()
        assert ["val_loss" in row for row in rows(loop, "epoch")] == [
            False, False, True, False, False, True, True,
        ]  # fmt: skip

    def test_it_is_the_mean_over_the_split_without_noise(self, bench: "Bench") -> None:
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


class TestStopping:
    def run(self, bench: "Bench", values: list[float], **rule: Any) -> int:
        loop = bench.loop(
            epochs=len(values),
            metrics={"score": Scripted("score", values)},
            early_stop={"val_score": EarlyStop(**rule)},
        )
        return int(loop.run()["epochs"])

    def test_after_so_many_evaluations_without_improvement(
        self, bench: "Bench", caplog: pytest.LogCaptureFixture
    ) -> None:
        assert self.run(bench, [5, 3, 4, 2, 2, 3, 1, 0], patience=2) == 6
        assert caplog.records[-1].message == (
            "fit: stopped, val_score has not improved for 2 evaluations (best 2)"
        )

    def test_small_steps_do_not_count(self, bench: "Bench") -> None:
        assert self.run(bench, [5, 4.9, 4.8, 4.7, 1, 0], patience=3, min_delta=0.5) == 4

    def test_upwards(self, bench: "Bench") -> None:
        assert self.run(bench, [1, 2, 3, 3, 9], patience=1, mode=Mode.max) == 4

    def test_nan_is_no_improvement(self, bench: "Bench") -> None:
        assert self.run(bench, [math.nan, math.nan, math.nan, 1], patience=3) == 3

    def test_as_soon_as_the_target_is_met(
        self, bench: "Bench", caplog: pytest.LogCaptureFixture
    ) -> None:
        assert self.run(bench, [5, 4, 3, 2, 1], target=3) == 3
        assert caplog.records[-1].message == "fit: stopped, val_score reached 3"

    def test_target_upwards(self, bench: "Bench") -> None:
        assert self.run(bench, [0.1, 0.6, 0.5], target=0.55, mode=Mode.max) == 2

    def test_evaluations_count_not_epochs(self, bench: "Bench") -> None:
        loop = bench.loop(
            epochs=20,
            eval_every=2,
            metrics={"score": Scripted("score", [3.0] * 10)},
            early_stop={"val_score": EarlyStop(patience=2)},
        )
        assert loop.run()["epochs"] == 6

    def test_what_a_term_measures_can_stop(self, bench: "Bench") -> None:
        loop = bench.loop(
            epochs=9,
            loss={"error": Weight(), "anchored": Weight()},
            early_stop={"moved": EarlyStop(target=1e9)},
        )
        assert loop.run()["epochs"] == 1

    def test_the_rule_of_a_term_that_is_turned_off_rests(self, bench: "Bench") -> None:
        loop = bench.loop(
            epochs=3,
            loss={"error": Weight(), "anchored": Weight(0.0)},
            early_stop={"moved": EarlyStop(target=1e9)},
        )
        assert loop.run()["epochs"] == 3


class TestPlateau:
    def test_the_rate_falls_when_the_metric_stands(self, bench: "Bench") -> None:
        schedule = Schedule(decay=Decay.plateau, metric="val_score", factor=0.5, patience=2)
        loop = bench.loop(
            epochs=9,
            schedule=schedule,
            optimizer=schema.Optimizer(lr=0.08),
            metrics={"score": Scripted("score", [5, 4, 4, 4, 4, 4, 3, 3, 3])},
        )
        loop.run()
        expected = [0.08] * 4 + [0.04] * 2 + [0.02] * 3
        assert curve(loop, "lr") == pytest.approx(expected)

    def test_a_metric_that_is_not_there(self, bench: "Bench") -> None:
        schedule = Schedule(decay=Decay.plateau, metric="val_scroe")
        with pytest.raises(UserError) as caught:
            bench.loop(schedule=schedule).run()
        assert str(caught.value).startswith(
            "stage.fit.schedule.metric: no metric 'val_scroe'; there are train_loss, train_error, "
        )


class TestBest:
    def test_several_at_once_and_the_chosen_one_is_left(self, bench: "Bench") -> None:
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
    def test_the_numbers_are_those_of_the_weights_that_are_left(
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

    def test_what_was_measured_only_later_is_no_number_of_theirs(self, bench: "Bench") -> None:
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

    def test_one_that_never_was_a_number(self, bench: "Bench") -> None:
        score = Scripted("score", [math.nan] * 3)
        loop = bench.loop(metrics={"s": score}, best={"val_score": Mode.max}, select="val_score")
        with pytest.raises(UserError) as caught:
            loop.run()
        assert str(caught.value) == "stage.fit.select=val_score: it never was a number"

    def test_last_is_the_last(self, bench: "Bench") -> None:
        loop = bench.loop(best={"val_loss": Mode.max})
        loop.run()
        last = checkpoint.load(loop.checkpoints.folder / "last.pt")
        assert same(weights(loop.model), last["model"])
        assert last["values"]["epoch"] == 3

    def test_a_metric_that_is_not_there(self, bench: "Bench") -> None:
        with pytest.raises(UserError) as caught:
            bench.loop(best={"val_acc": Mode.max}).run()
        assert str(caught.value) == (
            "stage.fit.best: no metric 'val_acc'; there are train_loss, train_error, lr, val_loss, "
            "val_error"
        )


UNUSED = {"error": Weight(), "masked": Weight(0.0)}
FITS: dict[str, dict[str, Any]] = {
    "one term": {"loss": {"error": Weight()}},
    "one that does not act": {"loss": UNUSED},
    "whole batch": {"loss": {"error": Weight(), "spread": Weight()}},
    "nothing to evaluate": {"loss": {"spread": Weight(), "anchored": Weight()}},
    "refreshed": {"loss": {"error": Weight(), "anchored": Weight()}, "eval_every": 2},
    "selected": {
        "loss": {"error": Weight(), "anchored": Weight()},
        "best": {"val_loss": Mode.max},
        "select": "val_loss",
        "early_stop": {"moved": EarlyStop(target=-1.0)},
    },
}
# Settings that watch what a fit of error, spread and anchored never measures.
NEVER: list[tuple[str, dict[str, Any]]] = [
    ("early_stop", {"early_stop": {"val_spread": EarlyStop(patience=1)}}),
    ("early_stop", {"early_stop": {"epochs": EarlyStop(target=2, mode=Mode.max)}}),
    ("early_stop", {"early_stop": {"trian_loss": EarlyStop(patience=1)}, "metrics": {"m": 1}}),
    ("best", {"best": {"val_spread": Mode.max}}),
    ("schedule.metric", {"schedule": Schedule(decay=Decay.plateau, metric="val_anchored")}),
]


class TestNames:
    @pytest.mark.parametrize("settings", FITS.values(), ids=FITS)
    def test_the_numbers_of_a_fit_are_those_declared(
        self, bench: "Bench", make_term: Callable[[str], nn.Module], settings: dict[str, Any]
    ) -> None:
        terms = {name: make_term(name) for name in settings["loss"]}
        loop = bench.loop(terms=terms, **settings)
        stage = Fit(**vars(loop.settings))
        classes = {name: type(term) for name, term in terms.items()}
        assert set(loop.run()) == stage.metric_names(terms) == stage.metric_names(classes)

    def test_it_is_open_what_a_refresh_or_a_metric_of_ones_own_adds(self) -> None:
        class Refreshed:
            def refresh(self, epoch: int, predict: Any) -> dict[str, float]:
                raise NotImplementedError

        loss = {"it": Weight()}
        assert Fit(epochs=1, loss=loss).metric_names({"it": Refreshed}) is None
        assert Fit(epochs=1, loss=loss, metrics={"mine": None}).metric_names({"it": None}) is None

    @pytest.mark.parametrize(("key", "settings"), NEVER)
    def test_what_is_never_there_is_said_before_the_first_epoch(
        self, bench: "Bench", key: str, settings: dict[str, Any]
    ) -> None:
        loss = {"error": Weight(), "spread": Weight(), "anchored": Weight()}
        loop = bench.loop(loss=loss, **settings)
        there = "train_loss, train_error, train_anchored, train_spread, lr, val_loss, val_error"
        with pytest.raises(UserError) as caught:
            loop.run()
        assert re.fullmatch(
            rf"stage\.fit\.{key}: no metric '\w+'; there are {there}, moved", str(caught.value)
        )
        assert loop.state.step == 0

    def test_a_misspelled_one_beside_custom_metrics_is_said_at_the_first_evaluation(
        self, bench: "Bench"
    ) -> None:
        loop = bench.loop(
            metrics={"s": Scripted("score", [1.0] * 3)},
            early_stop={"val_scroe": EarlyStop(patience=1)},
        )
        with pytest.raises(UserError, match=r"^stage.fit.early_stop: no metric 'val_scroe'; "):
            loop.run()
        assert loop.state.epoch == 1


class TestEMA:
    def test_it_is_the_running_average_of_the_weights(self, bench: "Bench") -> None:
        loop = bench.loop(ema=0.9, epochs=2)
        average: dict[str, Tensor] = {}
        end_step = loop.end_step

        def following(*given: Any) -> None:
            end_step(*given)
            for name, value in weights(loop.model).items():
                before = average.get(name, value)
                average[name] = 0.9 * before + 0.1 * value

        loop.end_step = following  # type: ignore[method-assign]
        evaluated: list[Tensor] = []
        loop.run()
        evaluated = [value for _, value in sorted(weights(loop.model).items())]
        for value, (_, expected) in zip(evaluated, sorted(average.items()), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)

    def test_it_is_what_is_evaluated_and_kept_as_best(self, bench: "Bench") -> None:
        loop = bench.loop(ema=0.99, epochs=2, best={"val_loss": Mode.min})
        row = loop.run()
        batch = next(loop.val.batches(1000))
        error = (loop.model.eval()(batch)["x"] - batch["x"]).square().sum(1).mean()
        assert row["val_error"] == pytest.approx(error.item(), rel=1e-5)
        best = checkpoint.load(loop.checkpoints.folder / "best_val_loss.pt")["model"]
        assert same(best, weights(loop.model))
        assert not same(checkpoint.load(loop.checkpoints.folder / "last.pt")["model"], best)


class TestCheckpoints:
    def saved(self, loop: Loop) -> list[int]:
        return sorted(
            int(path.stem.removeprefix("step_")) for path in loop.checkpoints.folder.glob("step_*")
        )

    @pytest.mark.parametrize(
        ("every", "keep", "expected"),
        [(1, 1, [35]), (1, 3, [25, 30, 35]), (2, 9, [10, 20, 30, 35]), (9, 9, [35])],
    )
    def test_every_so_many_epochs_and_only_the_last_are_kept(
        self, bench: "Bench", every: int, keep: int, expected: list[int]
    ) -> None:
        loop = bench.loop(epochs=7, save_every=every, keep_last=keep)
        loop.run()
        assert self.saved(loop) == expected

    def test_not_again_within_so_many_seconds(self, bench: "Bench") -> None:
        loop = bench.loop(epochs=7, keep_last=9, save_seconds=1000)
        loop.run()
        assert self.saved(loop) == [35]

    def test_numbers_of_numpy_go_through_a_checkpoint(self, bench: "Bench") -> None:
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

    def test_a_truncated_one_falls_back_to_the_one_before(
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


class Everything:
    """A fit with all the state there is, run in one go or in pieces."""

    EPOCHS, STEPS = 5, 25

    def __init__(self, bench: "Bench", tiny: Make) -> None:
        self.bench, self.tiny = bench, tiny

    def loop(self, name: str, augment: Augment | None = None, **settings: Any) -> Loop:
        loss = {
            "error": Weight(),
            "masked": Weight(0.5, ramp=3),
            "spread": Weight(0.1),
            "anchored": Weight(0.1),
            "chance": Weight(0.1),
        }
        defaults: dict[str, Any] = {
            "loss": loss,
            "epochs": self.EPOCHS,
            "eval_every": 2,
            "log_every": 3,
            "keep_last": 2,
            "ema": 0.9,
            "schedule": Schedule(decay=Decay.plateau, warmup=1.5, patience=1, factor=0.7),
            "best": {"val_loss": Mode.min, "train_loss": Mode.min},
            "early_stop": {"val_loss": EarlyStop(patience=9, min_delta=10.0)},
            "select": "train_loss",
        }
        return self.bench.loop(
            name=name,
            model=self.tiny(dropout=0.3, norm=True),
            augment=augment or At(),
            **(defaults | settings),
        )

    def outcome(self, loop: Loop, result: Mapping[str, float]) -> list[Any]:
        """All that a fit leaves behind."""
        best = {
            p.name: checkpoint.load(p)["model"] for p in loop.checkpoints.folder.glob("best_*.pt")
        }
        last = checkpoint.load(loop.checkpoints.folder / "last.pt")
        return [weights(loop.model), rows(loop), dict(result), best, last]


def identical(one: Any, other: Any) -> bool:
    """Nested values, bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(identical, one, other))
    return bool(one == other) or (one != one and other != other)


class Killed(Exception):
    """Stands for SIGKILL: nothing is saved."""


def kill() -> None:
    raise Killed


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


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
    def test_told_to_stop_at_any_step_it_ends_with_the_same_bits(
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
    def test_also_with_other_settings(
        self, everything: Everything, settings: dict[str, Any]
    ) -> None:
        loop = everything.loop("undisturbed", **settings)
        expected = everything.outcome(loop, loop.run())
        assert identical(self.in_pieces(everything, (6, 1, 8), **settings), expected)

    @pytest.mark.parametrize("pieces", PIECES, ids=str)
    def test_killed_at_any_step_it_ends_with_the_same_bits(
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

    def test_what_was_interrupted_is_said(
        self, everything: Everything, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(Interrupted) as caught, signals.handled():
            everything.loop("said", At(7, do=terminate)).run()
        assert caught.value.exit_code == 143
        everything.loop("said").run()
        assert "fit: goes on from epoch 1, step 7" in [r.message for r in caplog.records]

    def test_a_stopped_fit_stays_stopped(self, bench: "Bench") -> None:
        rule = {"train_loss": EarlyStop(target=1e9)}
        first = bench.loop(early_stop=rule)
        second = bench.loop(early_stop=rule)
        assert first.run() == second.run()
        assert second.state.epoch == 1


class TestLogs:
    def events(self, bench: "Bench") -> EventAccumulator:
        writer = bench.writers[-1]
        writer.writer.flush()
        sizes = {"scalars": 0, "histograms": 0}
        events = EventAccumulator(str(writer.folder), size_guidance=sizes)
        events.Reload()
        return events

    def test_scalars_and_histograms_are_in_tensorboard(self, bench: "Bench") -> None:
        loop = bench.loop(epochs=4, histogram_every=2, log_every=3)
        loop.run()
        events = self.events(bench)
        tags = events.Tags()
        epoch = {"train_loss", "train_error", "val_loss", "val_error", "lr", *SPEED}
        step = {"train_loss", "train_error", "lr_default", "grad_norm"}
        assert set(tags["scalars"]) == {f"fit/{n}" for n in epoch} | {f"fit_step/{n}" for n in step}
        assert [e.step for e in events.Scalars("fit/val_loss")] == [5, 10, 15, 20]
        assert [e.value for e in events.Scalars("fit/val_loss")] == pytest.approx(
            curve(loop, "val_loss"), rel=1e-6
        )
        assert [e.step for e in events.Scalars("fit_step/grad_norm")] == [3, 6, 9, 12, 15, 18]
        names = {f"fit/{name}" for name, _ in loop.model.named_parameters()}
        assert set(tags["histograms"]) == names | {f"{name}.grad" for name in names}
        assert [e.step for e in events.Histograms("fit/decoder.bias.grad")] == [10, 20]

    def test_a_resumed_fit_has_its_whole_curve_there(self, bench: "Bench") -> None:
        with pytest.raises(Interrupted), signals.handled():
            bench.loop(epochs=4, augment=At(13, do=terminate)).run()
        bench.loop(epochs=4, augment=At()).run()
        events = self.events(bench)
        assert [e.step for e in events.Scalars("fit/val_loss")] == [5, 10, 15, 20]

    def test_the_norm_is_that_before_clipping(self, bench: "Bench") -> None:
        norms = []
        for name, clip in (("free", None), ("clipped", 1e-3)):
            loop = bench.loop(name=name, clip_norm=clip, epochs=1, log_every=1)
            loop.run()
            norms.append(rows(loop, "step")[0]["grad_norm"])
        assert norms[0] == pytest.approx(norms[1])
        assert norms[0] > 1e-2

    def test_the_bar_is_silent_when_nobody_looks(
        self, bench: "Bench", capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench.loop().run()
        assert capsys.readouterr() == ("", "")

    def test_the_bar_shows_epoch_step_loss_and_rate(
        self, bench: "Bench", monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
        os.set_blocking(ours, False)
        with os.fdopen(theirs, "w") as terminal:
            monkeypatch.setattr(sys, "stderr", terminal)
            pause = At(*range(1, 11), do=lambda: time.sleep(0.06))
            loop = bench.loop(
                epochs=2,
                log_every=2,
                augment=pause,
                schedule=CONSTANT,
                optimizer=schema.Optimizer(lr=2e-3),
            )
            loop.run()
            monkeypatch.undo()
            shown = os.read(ours, 100_000).decode()
        os.close(ours)
        assert "fit epoch 1/2" in shown
        assert "fit epoch 2/2" in shown
        assert "/10 [" in shown
        loss = f"{rows(loop, 'step')[-2]['train_loss']:.4g}"
        assert f"loss {loss} lr 2.0e-03" in shown


def test_a_full_disk_is_one_line(bench: "Bench", monkeypatch: pytest.MonkeyPatch) -> None:
    loop = bench.loop()
    writer = loop.rows.writer
    loop.rows = MetricLog(Path("/dev/full"), writer, "fit")
    monkeypatch.setattr(loop.rows, "rewind", lambda epoch, step: None)
    with pytest.raises(UserError, match=r"^disk full: cannot write /dev/full"):
        loop.run()
    with pytest.raises(UserError, match=r"^disk full"):
        loop.rows.close()


@pytest.fixture
def no_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestGPU:
    @pytest.mark.usefixtures("no_tf32")
    @pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
    @pytest.mark.parametrize("micro_batch", [None, 4])
    def test_every_precision_stays_close(
        self, bench: "Bench", precision: str, micro_batch: int | None
    ) -> None:
        loss = {name: Weight(0.5) for name in ("error", "masked", "spread", "anchored")}
        hardware = {
            "device": schema.Device.cuda,
            "precision": Precision(precision),
            "micro_batch": micro_batch,
        }
        fp32 = {"device": schema.Device.cuda, "precision": Precision.fp32}
        expected = bench.loop(name="fp32", loss=loss, hardware=fp32, ema=0.9).run()
        loop = bench.loop(name="other", loss=loss, hardware=hardware, ema=0.9)
        assert loop.run()["val_loss"] == pytest.approx(expected["val_loss"], rel=0.03)
        assert loop.scaler.is_enabled() == (precision == "fp16")
        assert loop.measured()["speed"]["peak_mib"] > 0

    def test_an_overflow_of_fp16_skips_the_step_and_goes_on(self, bench: "Bench") -> None:
        hardware = {"device": schema.Device.cuda, "precision": Precision.fp16}
        loop = bench.loop(hardware=hardware, epochs=4, log_every=1)
        loop.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
        loop.micro_batches.scaler = loop.scaler
        loop.state.scaler = loop.scaler
        loop.run()
        assert loop.scaler.get_scale() < 2.0**40

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_resumed_it_goes_on_close_by(self, bench: "Bench", tiny: Make, precision: str) -> None:
        everything = Everything(bench, tiny)
        hardware = {"device": schema.Device.cuda, "precision": Precision(precision)}
        expected = everything.loop("whole", hardware=hardware).run()
        with pytest.raises(Interrupted), signals.handled():
            everything.loop("parts", At(7, do=terminate), hardware=hardware).run()
        found = everything.loop("parts", hardware=hardware).run()
        assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-3)


def test_what_is_logged_when_it_goes_well_is_short(
    bench: "Bench", caplog: pytest.LogCaptureFixture
) -> None:
    bench.loop().run()
    assert [r.levelno for r in caplog.records] == [logging.INFO]
