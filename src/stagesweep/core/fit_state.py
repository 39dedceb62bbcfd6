"""The state of a fit, and its checkpoints."""

import logging
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from stagesweep.base.errors import UserError
from stagesweep.base.seeding import rng_state, set_rng_state
from stagesweep.config import schema
from stagesweep.core import checkpoint
from stagesweep.core.loss import Terms
from stagesweep.core.stopping import MetricTracker
from stagesweep.parallel.process_group import ProcessGroup

if TYPE_CHECKING:
    from stagesweep.parallel.fsdp import FSDP

log = logging.getLogger(__name__)

# Plain values that a checkpoint carries.
VALUES = ("epoch", "step", "batch", "row", "summary", "selected", "finished")


@dataclass(eq=False)
class FitState:
    """Everything that a fit needs to resume."""

    model: nn.Module
    ema: AveragedModel | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    terms: Terms
    tracker: MetricTracker
    # Draws the model's noise and augmentations.
    noise: torch.Generator
    # (total, weight) of each term, summed over the epoch so far: (terms, 2).
    sums: Tensor
    # Epochs and steps that are done, and batches of the current epoch that are done.
    epoch: int = 0
    step: int = 0
    batch: int = 0
    finished: bool = False
    # Metrics of the current epoch; the latest of each name; those of the selected weights.
    row: dict[str, float] = field(default_factory=dict)
    summary: dict[str, float] = field(default_factory=dict)
    selected: dict[str, float] = field(default_factory=dict)

    @property
    def averaged(self) -> nn.Module:
        """The model to evaluate and to keep: the moving average if there is one."""
        module = self.model if self.ema is None else self.ema.module
        assert isinstance(module, nn.Module)
        return module

    def state_dict(self) -> dict[str, Any]:
        """The state, in types that ``weights_only`` loading allows."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "terms": {name: term.state_dict() for name, term in self.terms.items()},
            "tracker": self.tracker.state_dict(),
            "noise": self.noise.get_state(),
            "rng": rng_state(),
            "sums": self.sums,
            "values": {key: getattr(self, key) for key in VALUES},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name, term in self.terms.items():
            term.load_state_dict(state["terms"][name])
        self.tracker.load_state_dict(state["tracker"])
        self.noise.set_state(state["noise"])
        set_rng_state(state["rng"])
        self.sums = state["sums"].to(self.sums.device)
        for key, value in state["values"].items():
            setattr(self, key, value)

    def sharded(self) -> dict[str, Any]:
        """The part of the state that FSDP shards; in place of moments their parameter."""
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        return {
            "model": self.model.state_dict(),
            "ema": {} if self.ema is None else self.ema.state_dict(),
            "optimizer": {"state": dict(enumerate(ordered))},
        }


class FitCheckpoints:
    """The checkpoints of a fit: numbered ones to resume from, and the best by each metric."""

    def __init__(
        self,
        state: FitState,
        settings: schema.Fit,
        folder: Path,
        stage: str,
        group: ProcessGroup,
        fsdp: "FSDP | None",
    ) -> None:
        self.state, self.settings, self.folder, self.stage = state, settings, folder, stage
        self.group, self.fsdp = group, fsdp
        # The best weights since the last save.
        self.best_weights: dict[str, dict[str, Tensor]] = {}
        self.saved_at = perf_counter()

    @property
    def due(self) -> bool:
        """Whether this epoch is to be saved."""
        recent = perf_counter() - self.saved_at < self.settings.save_seconds
        return self.state.epoch % self.settings.save_every == 0 and not recent

    def keep_best(self, improved: Collection[str]) -> None:
        """Keep the current weights as the best by these metrics."""
        if not improved or not (self.group.is_main or self.fsdp):
            return
        weights = self.full_weights()
        for name in improved:
            self.best_weights[name] = weights
            if name == self.settings.select:
                self.state.selected = dict(self.state.summary)

    def full_weights(self) -> dict[str, Tensor]:
        """The weights to keep, in full, on the CPU of the main process."""
        if self.fsdp is not None:
            return self.fsdp.full_state_dict(self.state.averaged)
        weights = self.state.averaged.state_dict()
        return {name: value.detach().cpu().clone() for name, value in weights.items()}

    def save(self) -> None:
        """Write the best weights, then the state of the fit."""
        self.saved_at = perf_counter()
        for name, weights in self.best_weights.items() if self.group.is_main else ():
            checkpoint.save(self.folder / f"best_{name}.pt", {"model": weights})
        self.best_weights.clear()
        step, keep = self.state.step, self.settings.keep_last
        if self.fsdp is not None:
            state = self.state.state_dict()
            checkpoint.save_sharded(self.folder, step, state, keep, self.fsdp)
        elif self.group.is_main:
            checkpoint.save_numbered(self.folder, step, self.state.state_dict(), keep)

    def restore(self) -> bool:
        """Restore the newest checkpoint; False when there is none."""
        if self.fsdp is not None:
            own = self.state.sharded()
            load = partial(self.fsdp.load_state, own=own, load=checkpoint.load)
            state = checkpoint.load_newest(self.folder, load)
        else:
            found = checkpoint.load_newest(self.folder) if self.group.is_main else None
            state = self.group.broadcast(found)
        if state is None:
            return False
        self.state.load_state_dict(state)
        log.info(
            "%s: resuming from epoch %d, step %d", self.stage, self.state.epoch, self.state.step
        )
        return True

    def load_selected(self, model: nn.Module) -> dict[str, float]:
        """Load the weights of ``select`` into `model` on the main process; returns their metrics.

        UserError when the metric was never finite.
        """
        state, select, last = self.state, self.settings.select, {}
        if self.fsdp is not None:
            last = self.full_weights()
            if self.group.is_main:
                checkpoint.save(self.folder / "last.pt", {"model": last})
        if not self.group.is_main:  # only the main process continues the run
            return state.summary
        if select == "last":
            if state.ema is not None or self.fsdp is not None:
                model.load_state_dict(last or state.averaged.state_dict())
            return state.summary
        if state.tracker.best[select].value is None:
            raise UserError(f"stage.{self.stage}.select={select}: the metric was never finite")
        model.load_state_dict(checkpoint.load(self.folder / f"best_{select}.pt")["model"])
        # A metric that was first measured later does not belong to these weights.
        return dict.fromkeys(state.summary, math.nan) | state.selected
