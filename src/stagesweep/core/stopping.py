"""What a fit watches: best values, rules that end it, a plateau that lowers its learning rate."""

import logging
import math
from collections.abc import Collection, Mapping
from typing import Any

from stagesweep.base.errors import UserError
from stagesweep.config import schema

log = logging.getLogger(__name__)


class Best:
    """The best value of a metric so far, and for how many evaluations it has not improved."""

    def __init__(self, mode: schema.Mode, min_delta: float = 0.0) -> None:
        self.sign = 1.0 if mode is schema.Mode.max else -1.0
        self.min_delta = min_delta
        self.value: float | None = None
        self.since = 0

    def update(self, value: float) -> bool:
        """Whether `value` is better than all before it by more than ``min_delta``; NaN never is."""
        better = not math.isnan(value) and (
            self.value is None or self.sign * (value - self.value) > self.min_delta
        )
        self.value, self.since = (value, 0) if better else (self.value, self.since + 1)
        return better

    def reaches(self, target: float | None, value: float) -> bool:
        """Whether `value` is at `target` or beyond."""
        return target is not None and self.sign * (value - target) >= 0


class Watch:
    """All that a fit watches, with its state; ``rules`` are those of its early stopping that can
    be heard.
    """

    def __init__(
        self, settings: schema.Fit, rules: Mapping[str, schema.EarlyStop], stage: str
    ) -> None:
        self.settings, self.rules, self.stage = settings, rules, stage
        self.best = {name: Best(mode) for name, mode in settings.best.items()}
        self.stops = {name: Best(rule.mode, rule.min_delta) for name, rule in rules.items()}
        self.plateau = Best(settings.schedule.mode)
        self.lr_scale = 1.0

    def evaluated(self, row: Mapping[str, float]) -> list[str]:
        """Take in the numbers of an evaluation; returns the metrics that are the best so far.

        On a plateau the factor of the learning rate, ``lr_scale``, falls.
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
        """Whether any of the early-stopping rules says so."""
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
        """A metric of this epoch; UserError lists those there are."""
        if name not in row:
            raise self.no_metric(name, key, row)
        return row[name]

    def check(self, known: Collection[str] | None) -> None:
        """UserError when a metric is watched that is not among those known (None: any may come)."""
        if known is None:
            return
        s = self.settings
        watched = [("best", name) for name in s.best]
        watched += [("early_stop", name) for name in self.rules]
        if s.schedule.decay is schema.Decay.plateau:
            watched.append(("schedule.metric", s.schedule.metric))
        for key, name in watched:
            # What custom metrics are called is known after the first evaluation.
            if name not in known and not (s.metrics and name.startswith("val_")):
                raise self.no_metric(name, key, known)

    def no_metric(self, name: str, key: str, there: Collection[str]) -> UserError:
        """What to say of a metric that is not there."""
        have = ", ".join(there)
        return UserError(f"stage.{self.stage}.{key}: no metric '{name}'; there are {have}")

    def trackers(self) -> dict[str, Best]:
        """Every best-so-far by a name of its own."""
        named = {f"best/{n}": b for n, b in self.best.items()}
        return named | {f"stop/{n}": b for n, b in self.stops.items()} | {"plateau": self.plateau}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint carries."""
        values = {name: [best.value, best.since] for name, best in self.trackers().items()}
        return {"values": values, "lr_scale": self.lr_scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state_dict` gave."""
        self.lr_scale = state["lr_scale"]
        for name, best in self.trackers().items():
            best.value, best.since = state["values"][name]
