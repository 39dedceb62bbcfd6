"""The fit loop: `Loop.run` is training from the first batch to the last checkpoint."""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stagesweep.base import signals
from stagesweep.base.errors import Pruned, UserError
from stagesweep.base.seeding import derive, seed_everything
from stagesweep.base.spec import Spec
from stagesweep.base.terms import disabled_metrics, metric_names, refresh_metrics
from stagesweep.base.trial import Trial
from stagesweep.base.view import Batch, View
from stagesweep.config import schema
from stagesweep.core.evaluate import evaluate
from stagesweep.core.fit_state import FitCheckpoints, FitState
from stagesweep.core.loss import WeightedLoss
from stagesweep.core.optim import (
    build_optimizer,
    freeze,
    frozen_modules,
    learning_rate,
    parameters_and_gradients,
    running_average,
    train_mode,
)
from stagesweep.core.predict import forward, predict, to_device
from stagesweep.core.step_metrics import StepMetrics
from stagesweep.core.stopping import MetricTracker
from stagesweep.core.train_batches import TrainBatches
from stagesweep.hardware.out_of_memory import OutOfMemoryRetry
from stagesweep.hardware.profile import HardwareProfile
from stagesweep.hardware.throughput import Throughput
from stagesweep.parallel.micro_batch_size import find_micro_batch
from stagesweep.parallel.micro_batches import MicroBatches
from stagesweep.parallel.process_group import SINGLE_PROCESS, ProcessGroup
from stagesweep.tracking.metric_log import MetricLog, progress_bar

if TYPE_CHECKING:
    from stagesweep.parallel.fsdp import FSDP


class Loop:
    """One fit: its model, loss, optimizer and logs, and the loop itself."""

    def __init__(
        self,
        model: nn.Module,
        terms: Mapping[str, nn.Module],
        settings: schema.Fit,
        views: Mapping[str, View],
        spec: Spec,
        hardware: HardwareProfile,
        seed: int,
        folder: Path,
        rows: MetricLog,
        trial: Trial | None = None,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.settings, self.hardware, self.seed, self.rows = settings, hardware, seed, rows
        self.trial, self.group, self.val = trial or Trial(), group, views["val"]
        if empty := [name for name, view in views.items() if not len(view)]:
            raise UserError(f"{rows.stage}: the {empty[0]} split has no samples; check data")
        if (adapt := getattr(model, "adapt", None)) is not None:
            adapt(views["train"])
        freeze(model, settings.train, settings.freeze)
        # With FSDP the model is a sharded copy; the given one gets the weights at the end.
        self.given, self.ema = model, running_average(model, settings.ema)
        self.fsdp = self.shard() if hardware.shard and group.world_size > 1 else None
        self.model = model = model if self.fsdp is None else self.fsdp.shard(model)
        self.frozen = frozen_modules(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        hardware.set_threads(sum(p.numel() for p in self.parameters))
        self.optimizer = build_optimizer(model, settings.optimizer)
        fp16 = hardware.precision is schema.Precision.fp16
        self.scaler = torch.amp.GradScaler(hardware.device.type, enabled=fp16)
        self.loss = WeightedLoss(terms, settings.loss, hardware.device)
        compiled: nn.Module = torch.compile(model) if hardware.compile else model  # type: ignore[assignment]
        self.forward = partial(forward, compiled, hardware)
        self.evaluated = compiled if self.ema is None else self.ema.module
        self.micro_batches = MicroBatches(compiled, self.scaler, hardware, group, self.fsdp)
        self.search_micro_batch = hardware.search_micro_batch
        self.evaluation_retry = OutOfMemoryRetry(
            hardware.micro_batch, "evaluation", hardware, can_retry=self.fsdp is None
        )
        disabled = disabled_metrics({name: terms[name] for name in settings.loss}, settings.loss)
        rules = {n: rule for n, rule in settings.early_stop.items() if n not in disabled}
        self.tracker = MetricTracker(settings, rules, rows.stage)
        undivided = bool(self.loss.whole_batch)
        self.batches = TrainBatches(views["train"], settings, spec, seed, group, undivided)
        self.throughput = Throughput(hardware.device)
        self.steps = StepMetrics(rows.stage, list(self.loss.terms), scaled=fp16)
        self.state = FitState(
            self.model, self.ema, self.optimizer, self.scaler, self.loss.terms, self.tracker,
            noise=torch.Generator(hardware.device).manual_seed(derive(seed, "noise")),
            sums=torch.zeros(len(self.loss.terms), 2, device=hardware.device),
            summary=dict.fromkeys(refresh_metrics(self.loss.terms) or (), math.nan),
        )  # fmt: skip
        self.checkpoints = FitCheckpoints(
            self.state, settings, folder, rows.stage, group, self.fsdp
        )

    def run(self) -> dict[str, float]:
        """Train to the end, from the newest checkpoint if there is one.

        Returns the metrics of the selected weights, and the number of `epochs`.
        """
        state, settings = self.state, self.settings
        self.tracker.check(metric_names(self.loss.terms))
        seed_everything(self.seed)
        self.checkpoints.restore()
        self.rows.rewind(state.epoch, state.step)  # drops rows that are logged again
        stage, visible = self.rows.stage, self.group.is_main
        with signals.deferred(), progress_bar(stage, state.step, visible) as bar:
            while state.epoch < settings.epochs and not state.finished:
                if state.batch == 0:
                    state.row = self.refresh_terms()
                train_mode(self.model, self.frozen)
                for batch, samples, position in self.epoch_batches(bar):
                    self.set_learning_rates(position)
                    for parameter in self.parameters:
                        parameter.grad = None
                    # Split into micro-batches that fit in memory, and over all processes.
                    values = self.micro_batches.backward(
                        batch, self.forward, self.loss, self.loss.factors(position), samples
                    )
                    norm = self.clip_gradients()
                    self.scaler.step(self.optimizer)
                    self.scaler.update()
                    if self.ema is not None:
                        self.ema.update_parameters(self.model)
                    self.end_step(values, norm, bar)
                    self.stop_on_signal()
                speed = self.end_epoch(bar)
                evaluated = state.epoch % settings.eval_every == 0 or state.epoch == settings.epochs
                if evaluated:
                    state.row |= self.evaluate()
                state.row = self.group.broadcast(state.row)
                state.summary |= state.row
                if evaluated:
                    self.checkpoints.keep_best(self.tracker.update(state.row))
                state.finished = self.tracker.should_stop(state.row)
                self.log_epoch(speed)
                if self.checkpoints.due:
                    self.checkpoints.save()
                self.stop_on_signal()
                if evaluated:
                    self.stop_if_pruned()
            self.checkpoints.save()
        metrics = self.checkpoints.load_selected(self.given)
        if self.group.is_main:
            self.given.to(self.hardware.device)
        return metrics | {"epochs": float(state.epoch)}

    # ---------------------------------------------------------------- parts of a step

    def epoch_batches(self, bar: Any) -> Iterator[tuple[Batch, int, float]]:
        """The batches of the epoch that are not done yet.

        Yields this process's batch, the samples of all processes, and the position in epochs.
        """
        state, device = self.state, self.hardware.device
        order, epochs = self.batches.order(state.epoch), self.settings.epochs
        bar.total = epochs * len(order)
        bar.set_description(f"{self.rows.stage} epoch {state.epoch + 1}/{epochs}", refresh=False)
        if (begin := getattr(self.model, "begin_epoch", None)) is not None:
            begin(state.epoch, epochs)
        sizes = [len(rows) for rows in order]
        gathered = self.batches.view.gather(self.batches.local_rows(order), start=state.batch)
        for batch in self.throughput.batches(gathered, sizes[state.batch :]):
            samples = sizes[state.batch]
            batch = self.batches.prepare(self.model, to_device(batch, device), samples, state.noise)
            self.micro_batches.retry.step = state.step + 1
            if self.search_micro_batch:
                self.micro_batches.retry.size = find_micro_batch(
                    self.micro_batches, self.forward, self.loss, self.hardware, batch, self.fsdp
                )
                self.search_micro_batch = False
            if self.group.world_size > 1:  # processes draw different dropout masks
                torch.manual_seed(derive(self.seed, "rank", self.group.rank, state.step))
            yield batch, samples, state.epoch + state.batch / len(order)

    def set_learning_rates(self, position: float) -> None:
        """Set the learning rate of every group, `position` epochs into the fit."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.tracker.lr_scale * learning_rate(
                group["base_lr"], position, self.settings.epochs, self.settings.schedule
            )

    def clip_gradients(self) -> Tensor:
        """Unscale and clip the gradients; returns their norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.settings.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip_norm, norm)
        return norm if self.fsdp is None else self.fsdp.full_tensor(norm)

    def end_step(self, values: Tensor, norm: Tensor, bar: Any) -> None:
        """Count the step, and log it if it is due."""
        state = self.state
        state.sums += values
        self.steps.add(values, norm)
        state.step += 1
        state.batch += 1
        bar.update()
        if state.step % self.settings.log_every == 0:
            self.steps.check(state.epoch, state.step)
            row = self.loss.metrics(values, self.loss.terms, "train")
            row |= {f"lr_{g['name']}": g["lr"] for g in self.optimizer.param_groups}
            row["grad_norm"] = norm.item()
            self.rows.row("step", state.epoch + 1, state.step, row)
            self.show(bar, row["train_loss"])

    def show(self, bar: Any, loss: float) -> None:
        """Show loss, learning rate and throughput on the progress bar."""
        lr = self.optimizer.param_groups[0]["lr"]
        speed = f"{self.throughput.samples_per_second():,.0f} samples/s"
        bar.set_postfix_str(f"loss {loss:.4g} lr {lr:.1e} {speed}", refresh=False)

    # ---------------------------------------------------------------- parts of an epoch

    def end_epoch(self, bar: Any) -> dict[str, float]:
        """Add the training metrics to the row of the epoch; returns its speed."""
        state = self.state
        self.steps.check(state.epoch, state.step)
        state.row |= self.loss.metrics(state.sums, self.loss.terms, "train")
        state.row["lr"] = self.optimizer.param_groups[0]["lr"]
        self.show(bar, state.row["train_loss"])
        state.sums.zero_()
        state.batch = 0
        speed = self.throughput.end_epoch()
        state.epoch += 1
        self.group.average_buffers(self.model, self.ema)
        return speed

    def refresh_terms(self) -> dict[str, float]:
        """Let terms with a `refresh` pass over the training set; returns their metrics."""
        over_train = partial(
            predict, self.state.averaged, self.batches.view, None, self.hardware,
            group=self.group, sharded=self.fsdp is not None,
        )  # fmt: skip
        row: dict[str, float] = {}
        for term in self.loss.terms.values():
            if (refresh := getattr(term, "refresh", None)) is not None:
                row |= refresh(self.state.epoch, over_train)
        return {name: float(value) for name, value in row.items()}

    def evaluate(self) -> dict[str, float]:
        """Loss terms and metrics on the validation split."""
        self.evaluation_retry.step = self.state.step
        return evaluate(
            self.evaluated, self.val, self.loss, self.settings.metrics, self.evaluation_retry,
            self.group, sharded=self.fsdp is not None,
        )  # fmt: skip

    def log_epoch(self, speed: dict[str, float]) -> None:
        """Log the row of the epoch, and histograms of weights and gradients if they are due."""
        state, every = self.state, self.settings.histogram_every
        self.rows.row("epoch", state.epoch, state.step, state.row | speed)
        if every and state.epoch % every == 0:
            full = Tensor.detach if self.fsdp is None else self.fsdp.full_tensor
            tensors = ((name, full(each)) for name, each in parameters_and_gradients(self.model))
            self.rows.histograms(tensors, state.step)

    def stop_on_signal(self) -> None:
        """Save and raise when this process or another has received a signal."""
        (signum,) = self.group.all_reduce_max(signals.pending())
        if signum:
            self.steps.check(self.state.epoch, self.state.step)
            self.group.average_buffers(self.model, self.ema)
            self.checkpoints.save()
            raise signals.stop(signum)

    def stop_if_pruned(self) -> None:
        """Report to the sweep; save and raise when it prunes this run."""
        state, settings = self.state, self.settings
        self.trial.report(self.rows.stage, state.row, state.epoch, settings.epochs)
        going_on = state.epoch < settings.epochs and not state.finished
        if going_on and any(self.group.all_reduce_max(self.trial.should_stop())):
            self.checkpoints.save()
            raise Pruned(f"pruned in stage {self.rows.stage}, after epoch {state.epoch}")

    def shard(self) -> "FSDP":
        """Shard the moving average; returns the FSDP wrapper."""
        from stagesweep.parallel.fsdp import FSDP

        fsdp = FSDP(self.group, self.hardware.device)
        if self.ema is not None:
            self.ema.module = fsdp.shard(self.ema.module)
        return fsdp

    def measured(self) -> dict[str, Any]:
        """The speed of the fit (see `Throughput`) and its out-of-memory events."""
        events = self.micro_batches.retry.events + self.evaluation_retry.events
        return {"speed": self.throughput.summary(), "oom": events}
