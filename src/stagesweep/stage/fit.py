"""The stage that trains."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stagesweep import config

if TYPE_CHECKING:
    from stagesweep.run import Run


@dataclass
class Fit(config.Fit):
    """Train the run's model by gradient descent and leave its weights."""

    def __call__(self, run: "Run") -> dict[str, float]:
        """Returns ``train_<term>``, ``val_<term>`` … of the epoch whose weights it leaves, and how
        many ``epochs`` it trained.
        """
        metrics = run.fit(run.model, self, run.stage)
        run.save_weights()
        return metrics

    def metric_names(self) -> set[str] | None:
        """Metrics known before training; None when custom metrics or terms may add to them."""
        if self.metrics:
            return None
        terms = {"loss", *self.loss}
        return (
            {f"train_{t}" for t in terms}
            | {f"val_{t}" for t in terms}
            | {"epochs", "lr", "label_change"}
        )
