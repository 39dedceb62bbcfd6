"""The training loop: epochs, batches, loss, step, schedule, evaluate, checkpoint, stop."""

import logging
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stagesweep.base import signals
from stagesweep.base.errors import NotFinite, Pruned, UserError
from stagesweep.base.spec import Spec
from stagesweep.base.terms import metric_names, reports, silent
from stagesweep.base.trial import Trial
from stagesweep.base.view import Batch, View
from stagesweep.config import schema
from stagesweep.core import checkpoint
from stagesweep.core.metric_log import MetricLog, progress_bar
from stagesweep.core.optim import (
    build_optimizer,
    freeze,
    frozen_modules,
    learning_rate,
    running_average,
    train_mode,
    trained,
)
from stagesweep.core.predict import joined, named, pick, predict, read_by, share_of, to_device
from stagesweep.core.seeding import derive, rng_state, seed_everything, set_rng_state
from stagesweep.core.step import WeightedLoss, add_up
from stagesweep.core.stopping import Watch
from stagesweep.hardware import micro_batch
from stagesweep.hardware.out_of_memory import Room
from stagesweep.hardware.profile import Machine
from stagesweep.hardware.throughput import Meter
from stagesweep.parallel.process_group import ALONE, Team

if TYPE_CHECKING:
    from stagesweep.parallel.fsdp import Shards

log = logging.getLogger(__name__)


class Loop:
    """One fit: everything it needs, the state a checkpoint carries, and the loop itself."""

    def __init__(
        self,
        model: nn.Module,
        terms: Mapping[str, nn.Module],
        settings: schema.Fit,
        views: Mapping[str, View],
        spec: Spec,
        machine: Machine,
        seed: int,
        folder: Path,
        rows: MetricLog,
        trial: Trial | None = None,
        team: Team = ALONE,
    ) -> None:
        self.trial, self.team = trial or Trial(), team
        self.settings, self.machine, self.folder = settings, machine, folder
        self.train, self.val, self.spec, self.rows = views["train"], views["val"], spec, rows
        self.seed = seed
        if empty := [name for name, view in views.items() if not len(view)]:
            raise UserError(f"{rows.stage}: the {empty[0]} split has no samples; check data")
        if (look := getattr(model, "look_at", None)) is not None:
            look(self.train)
        freeze(model, settings.train, settings.freeze)
        # Where each process has a part of it, `model` is a copy; the given one gets the weights.
        self.given = model
        self.shards: Shards | None = None
        self.ema = running_average(model, settings.ema)
        if machine.shard and team.size > 1:
            model = self.divide()
        self.model = model
        self.frozen = frozen_modules(model)
        self.optimizer = build_optimizer(model, settings.optimizer)
        fp16 = machine.precision is schema.Precision.fp16
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=fp16)
        self.loss = WeightedLoss(
            model, terms, settings.loss, machine, self.scaler, team, self.shards
        )
        # Then every process needs the batch as it is before it is divided.
        self.undivided = settings.augment is not None or bool(self.loss.whole)
        unheard = silent({name: terms[name] for name in settings.loss}, settings.loss)
        self.rules = {n: rule for n, rule in settings.early_stop.items() if n not in unheard}
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.meter = Meter(machine.device)
        divided = self.shards is not None
        self.room = Room(machine.micro_batch, "evaluation", machine, fixed=divided)
        machine.set_threads(sum(p.numel() for p in self.parameters))
        # Noise and augmentation have a stream of their own.
        self.noise = torch.Generator(machine.device).manual_seed(derive(seed, "noise"))
        self.start()

    def divide(self) -> nn.Module:
        """Divide the model and its running average among the processes."""
        from stagesweep.parallel.fsdp import Shards

        self.shards = Shards(self.team, self.machine.device)
        if self.ema is not None:
            self.ema.module = self.shards.divide(self.averaged)
        return self.shards.divide(self.given)

    def start(self) -> None:
        """Everything as it is before the first step."""
        settings = self.settings
        self.watch = Watch(settings, self.rules, self.rows.stage)
        self.best_weights: dict[str, dict[str, Tensor]] = {}
        self.epoch = self.step = self.batch = 0
        self.finished = False
        # Numbers of the current epoch; the latest of each kind; what these were when the weights
        # that `select` names were kept.
        self.row: dict[str, float] = {}
        self.summary = dict.fromkeys(reports(self.loss.terms) or (), math.nan)
        self.selected: dict[str, float] = {}
        self.saved_at = perf_counter()
        # Totals and weights of the epoch; values and gradient norms that are not checked yet.
        self.sums = torch.zeros(len(self.loss.terms), 2, device=self.machine.device)
        self.recent: list[Tensor] = []
        self.norms: list[Tensor] = []

    # ---------------------------------------------------------------- the loop

    def run(self) -> dict[str, float]:
        """Train to the end, from the newest checkpoint if there is one.

        Returns the numbers of the epoch whose weights are left, and how many `epochs` there were.
        """
        self.watch.check(metric_names(self.loss.terms))
        seed_everything(self.seed)
        self.restore()
        s = self.settings
        hidden = None if self.team.main else True
        with signals.deferred(), progress_bar(self.rows.stage, self.step, hidden) as bar:
            while self.epoch < s.epochs and not self.finished:
                if self.batch == 0:
                    self.row = self.refresh()
                speed = self.train_epoch(bar)
                self.epoch += 1
                self.team.average_buffers(self.model, self.ema)
                if evaluated := self.epoch % s.eval_every == 0 or self.epoch == s.epochs:
                    self.row |= self.evaluate()
                self.row = self.team.share(self.row)
                self.summary |= self.row
                if evaluated:
                    self.keep(self.watch.evaluated(self.row))
                self.finished = self.watch.should_stop(self.row)
                self.rows.row("epoch", self.epoch, self.step, self.row | speed)
                if s.histogram_every and self.epoch % s.histogram_every == 0:
                    whole = self.shards.whole if self.shards is not None else Tensor.detach
                    drawn = ((name, whole(each)) for name, each in trained(self.model))
                    self.rows.histograms(drawn, self.step)
                recent = perf_counter() - self.saved_at < s.save_seconds
                if self.epoch % s.save_every == 0 and not recent:
                    self.save()
                self.stop_if_told()
                if evaluated:
                    self.stop_if_pruned()
            self.save()
        return self.take_selected() | {"epochs": float(self.epoch)}

    def order(self) -> list[Tensor]:
        """The rows of each batch of this epoch; depends on seed and epoch alone."""
        generator = torch.Generator().manual_seed(derive(self.seed, "order", self.epoch))
        return list(self.train.order(self.settings.batch_size, generator, self.settings.sampler))

    def stop_if_told(self) -> None:
        """Save and raise when a signal has come to this process or another."""
        (signum,) = self.team.most(signals.told())
        if signum:
            self.check()
            self.team.average_buffers(self.model, self.ema)
            self.save()
            raise signals.stop(signum)

    def stop_if_pruned(self) -> None:
        """Tell the sweep how far this is; save and raise when it has no more use for it."""
        self.trial.report(self.rows.stage, self.row, self.epoch, self.settings.epochs)
        going_on = self.epoch < self.settings.epochs and not self.finished
        if going_on and any(self.team.most(self.trial.should_stop())):
            self.save()
            raise Pruned(f"pruned in stage {self.rows.stage}, after epoch {self.epoch}")

    def refresh(self) -> dict[str, float]:
        """Let terms that need a pass over the whole training set take it when due."""

        def over_train() -> dict[str, Tensor]:
            return predict(
                self.averaged,
                self.train,
                None,
                self.machine,
                team=self.team,
                divided=self.shards is not None,
            )

        row: dict[str, float] = {}
        for term in self.loss.terms.values():
            if (refresh := getattr(term, "refresh", None)) is not None:
                row |= refresh(self.epoch, over_train)
        return {name: float(value) for name, value in row.items()}

    def train_epoch(self, bar: Any) -> dict[str, float]:
        """Every batch of the epoch that is not done yet, one step each; returns the speed."""
        order, epochs = self.order(), self.settings.epochs
        bar.total = epochs * len(order)
        bar.set_description(f"{self.rows.stage} epoch {self.epoch + 1}/{epochs}", refresh=False)
        train_mode(self.model, self.frozen)
        sizes = [len(rows) for rows in order]
        gathered = self.train.gather(self.shares(order), start=self.batch)
        for batch in self.meter.batches(gathered, sizes[self.batch :]):
            size = sizes[self.batch]
            batch = self.prepare(to_device(batch, self.machine.device), size)
            self.loss.room.step = self.step + 1
            if self.loss.room.unknown:
                micro_batch.find(self.loss, batch)
            position = self.epoch + self.batch / len(order)
            self.set_rates(position)
            for parameter in self.parameters:
                parameter.grad = None
            if self.team.size > 1:  # what the model draws itself differs between processes
                torch.manual_seed(derive(self.seed, "rank", self.team.rank, self.step))
            values = self.loss.backward(batch, position, size)
            self.update()
            self.sums += values
            self.recent.append(values)
            self.step += 1
            self.batch += 1
            bar.update()
            if self.step % self.settings.log_every == 0:
                self.log_step(bar)
            self.stop_if_told()
        self.check()
        self.row |= self.means(self.sums, self.loss.terms, "train")
        self.row["lr"] = self.optimizer.param_groups[0]["lr"]
        self.show(bar, self.row["train_loss"])
        self.sums.zero_()
        self.batch = 0
        return self.meter.end_epoch()

    def shares(self, order: list[Tensor]) -> list[Tensor]:
        """The rows of each batch that this process reads: its own part, where that is enough."""
        if self.undivided or self.team.size == 1:
            return order
        return [r if len(r) < self.team.size else r[self.team.part(len(r))] for r in order]

    def prepare(self, batch: Batch, samples: int) -> Batch:
        """Add what is drawn at random for the undivided batch: noise and augmented copies."""
        if (sample := getattr(self.model, "sample_noise", None)) is not None:
            noise = sample(samples, self.noise)
            if len(batch["index"]) < samples:
                noise = {name: value[self.team.part(samples)] for name, value in noise.items()}
            batch |= noise
        if self.settings.augment is not None:
            batch |= self.settings.augment(batch, self.spec, self.noise)
        return batch

    def set_rates(self, position: float) -> None:
        """Learning rate of every group, `position` epochs into the fit."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.watch.lr_scale * learning_rate(
                group["base_lr"], position, self.settings.epochs, self.settings.schedule
            )

    def update(self) -> None:
        """Clip, step, and follow with the running average of the weights."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.settings.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip_norm, norm)
        self.norms.append(norm if self.shards is None else self.shards.whole(norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    # ---------------------------------------------------------------- numbers

    def check(self) -> None:
        """End the run if a step since the last check had a bad value.

        The values stay on the device until now, so that no step waits for another.
        """
        if not self.recent:
            return
        totals = torch.stack(self.recent)[:, :, 0]
        names = [f"loss term '{name}'" for name in self.loss.terms]
        if not self.scaler.is_enabled():  # which skips the steps of gradients that overflow
            totals = torch.cat([totals, torch.stack(self.norms).unsqueeze(1)], 1)
            names.append("the gradient")
        self.recent.clear()
        self.norms.clear()
        for row, column in (~totals.isfinite()).nonzero().tolist():
            stage = self.rows.stage
            raise NotFinite(
                f"{stage}: {names[column]} became {totals[row, column].item()} in epoch "
                f"{self.epoch + 1}, step {self.step - len(totals) + row + 1}; lower "
                f"stage.{stage}.optimizer.lr, set stage.{stage}.clip_norm or use "
                f"hardware.precision=fp32"
            )

    def log_step(self, bar: Any) -> None:
        """One row of numbers of the latest step."""
        values, norm = self.recent[-1], self.norms[-1]
        self.check()
        row = self.means(values, self.loss.terms, "train")
        row |= {f"lr_{g['name']}": g["lr"] for g in self.optimizer.param_groups}
        row["grad_norm"] = norm.item()
        self.rows.row("step", self.epoch + 1, self.step, row)
        self.show(bar, row["train_loss"])

    def show(self, bar: Any, loss: float) -> None:
        """Put the latest numbers behind the bar."""
        rate = self.optimizer.param_groups[0]["lr"]
        speed = f"{self.meter.samples_per_second():,.0f} samples/s"
        bar.set_postfix_str(f"loss {loss:.4g} lr {rate:.1e} {speed}", refresh=False)

    def means(self, sums: Tensor, terms: Mapping[str, nn.Module], split: str) -> dict[str, float]:
        """Each term's mean and their weighted sum (full weights, so that ramps do not show)."""
        values = (sums[:, 0] / sums[:, 1].clamp(min=1e-12)).tolist()
        total = sum(self.loss.weights[n].weight * v for n, v in zip(terms, values, strict=True))
        return {f"{split}_loss": total} | {
            f"{split}_{n}": v for n, v in zip(terms, values, strict=True)
        }

    @property
    def averaged(self) -> nn.Module:
        """The weights a person gets: the running average where there is one."""
        module = self.model if self.ema is None else self.ema.module
        assert isinstance(module, nn.Module)
        return module

    def evaluate(self) -> dict[str, float]:
        """Per-sample loss terms and the stage's metrics on the validation split."""
        self.room.step = self.step
        part, team = share_of(self.val, self.team, self.shards is not None)
        sums, seen = self.room.within(lambda size: self.score(part(size)), min(1024, len(self.val)))
        terms = self.loss.per_sample()
        row = self.means(team.sum(sums), terms, "val") if terms else {}
        if seen:
            arrays = joined(seen, team, len(self.val))
            # The others are told what the main process found.
            for metric in self.settings.metrics.values() if self.team.main else ():
                found = metric(arrays)
                row |= {f"val_{name}": float(value) for name, value in found.items()}
        return row

    @torch.no_grad()
    def score(self, batches: Iterable[Batch]) -> tuple[Tensor, list[Batch]]:
        """Totals and weights of per-sample terms, (terms, 2), and what the metrics read."""
        terms = self.loss.per_sample()
        sums = torch.zeros(len(terms), 2, device=self.machine.device)
        wanted = read_by(self.settings.metrics.values())
        seen: list[dict[str, Tensor]] = []
        model = self.loss.model if self.ema is None else self.averaged
        model.eval()
        for batch in batches:
            batch = to_device(batch, self.machine.device)
            outputs = self.loss.forward(model, batch)
            sums += torch.stack(add_up(terms, outputs, batch), 1)
            if self.settings.metrics:
                arrays = named(outputs, batch)
                seen.append(arrays if wanted is None else pick(wanted, arrays))
        return sums, seen

    def measured(self) -> dict[str, Any]:
        """How fast it was (see `Meter`), and every time that memory ran out (see `Room`)."""
        return {"speed": self.meter.summary(), "oom": self.loss.room.events + self.room.events}

    # ---------------------------------------------------------------- checkpoints

    def keep(self, improved: Collection[str]) -> None:
        """Keep the weights as the best by these metrics."""
        if not improved or not (self.team.main or self.shards):
            return
        weights = self.weights()
        for name in improved:
            self.best_weights[name] = weights
            if name == self.settings.select:
                self.selected = dict(self.summary)

    def weights(self) -> dict[str, Tensor]:
        """The weights a person gets, whole, on the CPU of the main process."""
        if self.shards is not None:
            return self.shards.weights(self.averaged)
        weights = self.averaged.state_dict()
        return {name: value.detach().cpu().clone() for name, value in weights.items()}

    def save(self) -> None:
        """Write the best weights, then everything that the loop needs to go on."""
        self.saved_at = perf_counter()
        for name, weights in self.best_weights.items() if self.team.main else ():
            checkpoint.save(self.folder / f"best_{name}.pt", {"model": weights})
        self.best_weights.clear()
        if self.shards is not None:
            self.shards.save(self.folder, self.step, self.state(), self.settings.keep_last)
        elif self.team.main:
            checkpoint.save_numbered(self.folder, self.step, self.state(), self.settings.keep_last)

    def state(self) -> dict[str, Any]:
        """Everything that the loop needs to go on."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "terms": {name: term.state_dict() for name, term in self.loss.terms.items()},
            "watch": self.watch.state_dict(),
            "noise": self.noise.get_state(),
            "rng": rng_state(),
            "sums": self.sums,
            "loop": {key: getattr(self, key) for key in LOOP},
        }

    def own(self) -> dict[str, Any]:
        """What of the state is divided."""
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        return {
            "model": self.model.state_dict(),
            "ema": {} if self.ema is None else self.ema.state_dict(),
            "optimizer": {"state": dict(enumerate(ordered))},
        }

    def restore(self) -> None:
        """Go back to the newest checkpoint; without one, start."""
        if self.shards is not None:
            state = self.shards.load_newest(self.folder, self.own())
        else:
            state = self.team.share(checkpoint.load_newest(self.folder) if self.team.main else None)
        if state is None:
            self.rows.rewind(epoch=0, step=0)
            return
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name, term in self.loss.terms.items():
            term.load_state_dict(state["terms"][name])
        self.watch.load_state_dict(state["watch"])
        self.noise.set_state(state["noise"])
        set_rng_state(state["rng"])
        self.sums = state["sums"].to(self.machine.device)
        for key, value in state["loop"].items():
            setattr(self, key, value)
        self.rows.rewind(self.epoch, self.step)
        log.info("%s: goes on from epoch %d, step %d", self.rows.stage, self.epoch, self.step)

    def take_selected(self) -> dict[str, float]:
        """Leave the model with the weights the stage is to end with; returns their numbers."""
        select, last = self.settings.select, {}
        if self.shards is not None:
            last = self.weights()
            if self.team.main:
                checkpoint.save(self.folder / "last.pt", {"model": last})
        if not self.team.main:  # which goes on from here alone
            return self.summary
        numbers = self.summary
        if select == "last":
            if self.ema is not None or self.shards is not None:
                self.given.load_state_dict(last or self.averaged.state_dict())
        else:
            if self.watch.best[select].value is None:
                raise UserError(f"stage.{self.rows.stage}.select={select}: it never was a number")
            self.given.load_state_dict(checkpoint.load(self.folder / f"best_{select}.pt")["model"])
            # What was first measured later is no number of these weights.
            numbers = dict.fromkeys(self.summary, math.nan) | self.selected
        self.given.to(self.machine.device)
        return numbers


# Plain values of the loop that a checkpoint carries.
LOOP = ("epoch", "step", "batch", "row", "summary", "selected", "finished")
