"""The stage that trains a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stagesweep.base.terms import metric_names
from stagesweep.config import schema

if TYPE_CHECKING:
    from stagesweep.run.context import Context


@dataclass
class Fit(schema.Fit):
    """Train the run's model by gradient descent and save its weights."""

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return ``train_<term>``, ``val_<term>`` … of the epoch whose weights are saved, and the
        number of ``epochs`` trained.
        """
        metrics = run.fit(run.model, self, run.stage)
        run.save_weights()
        return metrics

    def metric_names(self, terms: Mapping[str, Any]) -> set[str] | None:
        """Names of the metrics; None when custom metrics or terms may add to them.

        `terms` are the loss terms, or their classes.
        """
        known = metric_names({n: terms[n] for n, use in self.loss.items() if use.weight > 0})
        return None if known is None or self.metrics else {*known, "epochs"}
