import fcntl
import logging
import math
import os
import re
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import (
    At,
    Bench,
    Columns,
    Everything,
    Make,
    Scripted,
    Tiny,
    curve,
    rows,
    same,
    terminate,
    weights,
)
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from torch import Tensor, nn

from stagesweep.base import signals
from stagesweep.base.errors import Interrupted, UserError
from stagesweep.base.view import Batch, View
from stagesweep.config import schema
from stagesweep.config.schema import Decay, EarlyStop, Mode, Precision, Schedule, Weight
from stagesweep.core import checkpoint
from stagesweep.core.optim import learning_rate
from stagesweep.data.loader import LoaderView
from stagesweep.hardware.throughput import SPEED
from stagesweep.stage.fit import Fit
from stagesweep.tracking.metric_log import MetricLog

SGD = schema.Optimizer(_target_="torch.optim.SGD", lr=0.05, weight_decay=0.0)
CONSTANT = Schedule(decay=Decay.constant)


class Curriculum(Tiny):
    """Is told of each epoch, and computes something else in each."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int, int]] = []

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        self.told.append((epoch, epochs))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {
            name: value * (1 + self.told[-1][0]) for name, value in super().forward(batch).items()
        }


class TestTraining:
    def test_a_model_is_told_of_each_epoch_also_when_it_goes_on_within_one(
        self, bench: "Bench"
    ) -> None:
        whole, cut, rest = (self.curriculum() for _ in range(3))
        bench.loop(model=whole, name="whole", augment=At()).run()
        assert whole.told == [(0, 3), (1, 3), (2, 3)]
        # Five steps are an epoch.
        with pytest.raises(Interrupted), signals.handled():
            bench.loop(model=cut, name="cut", augment=At(7, do=terminate)).run()
        bench.loop(model=rest, name="cut", augment=At()).run()
        assert rest.told == [(1, 3), (2, 3)]
        assert same(weights(whole), weights(rest))

    @staticmethod
    def curriculum() -> Curriculum:
        torch.manual_seed(1)
        return Curriculum()

    def test_a_fit_equals_a_hand_written_loop(
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

    def test_a_compiled_fit_has_the_same_loss_curve(
        self, bench: "Bench", monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compile_ = torch.compile  # without a C++ compiler: capture and run
        monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend="eager"))
        plain = bench.loop(name="plain").run()
        compiled = bench.loop(name="compiled", hardware={"compile": True})
        found = compiled.run()
        assert found["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-5)
        assert not any("_orig_mod" in name for name in compiled.model.state_dict())

    def test_a_fit_from_a_loader_has_the_same_loss_curve(
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

    def test_frozen_parameters_do_not_change_and_groups_have_their_rates(
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

    def test_a_fit_with_a_whole_batch_term_only(self, bench: "Bench") -> None:
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


class TestStopping:
    def run(self, bench: "Bench", values: list[float], **rule: Any) -> int:
        loop = bench.loop(
            epochs=len(values),
            metrics={"score": Scripted("score", values)},
            early_stop={"val_score": EarlyStop(**rule)},
        )
        return int(loop.run()["epochs"])

    def test_stops_after_patience_evaluations(
        self, bench: "Bench", caplog: pytest.LogCaptureFixture
    ) -> None:
        assert self.run(bench, [5, 3, 4, 2, 2, 3, 1, 0], patience=2) == 6
        assert caplog.records[-1].message == (
            "fit: stopped, val_score has not improved for 2 evaluations (best 2)"
        )

    def test_improvements_below_min_delta_do_not_count(self, bench: "Bench") -> None:
        assert self.run(bench, [5, 4.9, 4.8, 4.7, 1, 0], patience=3, min_delta=0.5) == 4

    def test_a_metric_to_maximise(self, bench: "Bench") -> None:
        assert self.run(bench, [1, 2, 3, 3, 9], patience=1, mode=Mode.max) == 4

    def test_nan_is_not_an_improvement(self, bench: "Bench") -> None:
        assert self.run(bench, [math.nan, math.nan, math.nan, 1], patience=3) == 3

    def test_stops_when_the_target_is_reached(
        self, bench: "Bench", caplog: pytest.LogCaptureFixture
    ) -> None:
        assert self.run(bench, [5, 4, 3, 2, 1], target=3) == 3
        assert caplog.records[-1].message == "fit: stopped, val_score reached 3"

    def test_the_target_of_a_metric_to_maximise(self, bench: "Bench") -> None:
        assert self.run(bench, [0.1, 0.6, 0.5], target=0.55, mode=Mode.max) == 2

    def test_patience_counts_evaluations(self, bench: "Bench") -> None:
        loop = bench.loop(
            epochs=20,
            eval_every=2,
            metrics={"score": Scripted("score", [3.0] * 10)},
            early_stop={"val_score": EarlyStop(patience=2)},
        )
        assert loop.run()["epochs"] == 6

    def test_a_metric_of_a_term_can_stop_a_fit(self, bench: "Bench") -> None:
        loop = bench.loop(
            epochs=9,
            loss={"error": Weight(), "anchored": Weight()},
            early_stop={"moved": EarlyStop(target=1e9)},
        )
        assert loop.run()["epochs"] == 1

    def test_the_rule_of_a_disabled_term_is_ignored(self, bench: "Bench") -> None:
        loop = bench.loop(
            epochs=3,
            loss={"error": Weight(), "anchored": Weight(0.0)},
            early_stop={"moved": EarlyStop(target=1e9)},
        )
        assert loop.run()["epochs"] == 3


class TestPlateau:
    def test_the_learning_rate_falls_on_a_plateau(self, bench: "Bench") -> None:
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

    def test_an_unknown_metric(self, bench: "Bench") -> None:
        schedule = Schedule(decay=Decay.plateau, metric="val_scroe")
        with pytest.raises(UserError) as caught:
            bench.loop(schedule=schedule).run()
        assert str(caught.value).startswith(
            "stage.fit.schedule.metric: no metric 'val_scroe'; there are train_loss, train_error, "
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
    def test_the_metrics_of_a_fit_are_those_declared(
        self, bench: "Bench", make_term: Callable[[str], nn.Module], settings: dict[str, Any]
    ) -> None:
        terms = {name: make_term(name) for name in settings["loss"]}
        loop = bench.loop(terms=terms, **settings)
        stage = Fit(**vars(loop.settings))
        classes = {name: type(term) for name, term in terms.items()}
        assert set(loop.run()) == stage.metric_names(terms) == stage.metric_names(classes)

    def test_metric_names_are_unknown_with_a_refresh_or_custom_metrics(self) -> None:
        class Refreshed:
            def refresh(self, epoch: int, predict: Any) -> dict[str, float]:
                raise NotImplementedError

        loss = {"it": Weight()}
        assert Fit(epochs=1, loss=loss).metric_names({"it": Refreshed}) is None
        assert Fit(epochs=1, loss=loss, metrics={"mine": None}).metric_names({"it": None}) is None

    @pytest.mark.parametrize(("key", "settings"), NEVER)
    def test_an_unknown_metric_is_reported_before_the_first_epoch(
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

    def test_a_misspelled_custom_metric_is_reported_at_the_first_evaluation(
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
    def test_ema_is_the_running_average_of_the_weights(self, bench: "Bench") -> None:
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

    def test_ema_weights_are_evaluated_and_kept_as_best(self, bench: "Bench") -> None:
        loop = bench.loop(ema=0.99, epochs=2, best={"val_loss": Mode.min})
        row = loop.run()
        batch = next(loop.val.batches(1000))
        error = (loop.model.eval()(batch)["x"] - batch["x"]).square().sum(1).mean()
        assert row["val_error"] == pytest.approx(error.item(), rel=1e-5)
        best = checkpoint.load(loop.checkpoints.folder / "best_val_loss.pt")["model"]
        assert same(best, weights(loop.model))
        assert not same(checkpoint.load(loop.checkpoints.folder / "last.pt")["model"], best)


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

    def test_a_resumed_fit_has_its_whole_curve_in_tensorboard(self, bench: "Bench") -> None:
        with pytest.raises(Interrupted), signals.handled():
            bench.loop(epochs=4, augment=At(13, do=terminate)).run()
        bench.loop(epochs=4, augment=At()).run()
        events = self.events(bench)
        assert [e.step for e in events.Scalars("fit/val_loss")] == [5, 10, 15, 20]

    def test_the_logged_norm_is_before_clipping(self, bench: "Bench") -> None:
        norms = []
        for name, clip in (("free", None), ("clipped", 1e-3)):
            loop = bench.loop(name=name, clip_norm=clip, epochs=1, log_every=1)
            loop.run()
            norms.append(rows(loop, "step")[0]["grad_norm"])
        assert norms[0] == pytest.approx(norms[1])
        assert norms[0] > 1e-2

    def test_the_progress_bar_is_hidden_without_a_terminal(
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

    def test_an_overflow_in_fp16_skips_the_step(self, bench: "Bench") -> None:
        hardware = {"device": schema.Device.cuda, "precision": Precision.fp16}
        loop = bench.loop(hardware=hardware, epochs=4, log_every=1)
        loop.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
        loop.micro_batches.scaler = loop.scaler
        loop.state.scaler = loop.scaler
        loop.run()
        assert loop.scaler.get_scale() < 2.0**40

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_a_resumed_fit_on_a_gpu_stays_close(
        self, bench: "Bench", tiny: Make, precision: str
    ) -> None:
        everything = Everything(bench, tiny)
        hardware = {"device": schema.Device.cuda, "precision": Precision(precision)}
        expected = everything.loop("whole", hardware=hardware).run()
        with pytest.raises(Interrupted), signals.handled():
            everything.loop("parts", At(7, do=terminate), hardware=hardware).run()
        found = everything.loop("parts", hardware=hardware).run()
        assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-3)


def test_the_log_of_a_successful_fit_is_short(
    bench: "Bench", caplog: pytest.LogCaptureFixture
) -> None:
    bench.loop().run()
    assert [r.levelno for r in caplog.records] == [logging.INFO]
