"""Tracks the metrics of a fit: best values, early stopping, and the plateau schedule."""

import logging
import math
from collections.abc import Collection, Mapping
from typing import Any

from stagesweep.base.errors import UserError
from stagesweep.config import schema

log = logging.getLogger(__name__)


class BestValue:
    """The best value of a metric so far, and the evaluations since it improved."""

    def __init__(self, mode: schema.Mode, min_delta: float = 0.0) -> None:
        self.sign = 1.0 if mode is schema.Mode.max else -1.0
        self.min_delta = min_delta
        self.value: float | None = None
        self.since = 0

    def update(self, value: float) -> bool:
        """Whether `value` improves on the best by more than ``min_delta``; NaN never does."""
        better = not math.isnan(value) and (
            self.value is None or self.sign * (value - self.value) > self.min_delta
        )
        self.value, self.since = (value, 0) if better else (self.value, self.since + 1)
        return better

    def reaches(self, target: float | None, value: float) -> bool:
        """Whether `value` reaches `target`."""
        return target is not None and self.sign * (value - target) >= 0


class MetricTracker:
    """Tracks the metrics that a fit selects checkpoints, stops or lowers its learning rate by.

    ``rules`` are the early-stopping rules whose metric exists.
    """

    def __init__(
        self, settings: schema.Fit, rules: Mapping[str, schema.EarlyStop], stage: str
    ) -> None:
        self.settings, self.rules, self.stage = settings, rules, stage
        self.best = {name: BestValue(mode) for name, mode in settings.best.items()}
        self.stops = {name: BestValue(rule.mode, rule.min_delta) for name, rule in rules.items()}
        self.plateau = BestValue(settings.schedule.mode)
        self.lr_scale = 1.0

    def update(self, row: Mapping[str, float]) -> list[str]:
        """Add the metrics of an evaluation; returns those that are the best so far.

        On a plateau, ``lr_scale`` is reduced, a factor of the learning rate.
        """
        for name in self.rules:
            if name.startswith("val_"):
                self.value(row, name, "early_stop")
        improved = [n for n, best in self.best.items() if best.update(self.value(row, n, "best"))]
        schedule = self.settings.schedule
        if schedule.decay is schema.Decay.plateau:
            self.plateau.update(self.value(row, schedule.metric, "schedule.metric"))
            if self.plateau.since >= max(schedule.patience, 1):
                self.lr_scale, self.plateau.since = self.lr_scale * schedule.factor, 0
        return improved

    def should_stop(self, row: Mapping[str, float]) -> bool:
        """Whether an early-stopping rule ends the fit."""
        for name, rule in self.rules.items():
            if name not in row:
                continue  # not measured in this epoch
            best = self.stops[name]
            best.update(row[name])
            if best.reaches(rule.target, row[name]):
                log.info("%s: stopped, %s reached %g", self.stage, name, row[name])
                return True
            if rule.patience is not None and best.since >= max(rule.patience, 1):
                value = math.nan if best.value is None else best.value
                log.info(
                    "%s: stopped, %s has not improved for %d evaluations (best %g)",
                    self.stage, name, best.since, value,
                )  # fmt: skip
                return True
        return False

    def value(self, row: Mapping[str, float], name: str, key: str) -> float:
        """A metric of this epoch; UserError lists the metrics there are."""
        if name not in row:
            raise self.no_metric(name, key, row)
        return row[name]

    def check(self, known: Collection[str] | None) -> None:
        """UserError for a tracked metric that is not in `known` (None: any may come)."""
        if known is None:
            return
        s = self.settings
        tracked = [("best", name) for name in s.best]
        tracked += [("early_stop", name) for name in self.rules]
        if s.schedule.decay is schema.Decay.plateau:
            tracked.append(("schedule.metric", s.schedule.metric))
        for key, name in tracked:
            # Names of custom metrics are known after the first evaluation.
            if name not in known and not (s.metrics and name.startswith("val_")):
                raise self.no_metric(name, key, known)

    def no_metric(self, name: str, key: str, there: Collection[str]) -> UserError:
        """The error for a metric that does not exist."""
        have = ", ".join(there)
        return UserError(f"stage.{self.stage}.{key}: no metric '{name}'; there are {have}")

    def trackers(self) -> dict[str, BestValue]:
        """All best values by a unique name."""
        named = {f"best/{n}": b for n, b in self.best.items()}
        return named | {f"stop/{n}": b for n, b in self.stops.items()} | {"plateau": self.plateau}

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        values = {name: [best.value, best.since] for name, best in self.trackers().items()}
        return {"values": values, "lr_scale": self.lr_scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        self.lr_scale = state["lr_scale"]
        for name, best in self.trackers().items():
            best.value, best.since = state["values"][name]
