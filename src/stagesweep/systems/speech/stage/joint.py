"""Stage that trains the experts and the gate together."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stagesweep.stage.fit import Fit
from stagesweep.systems.speech.stage.fits import error_rates_enabled, split_view

if TYPE_CHECKING:
    from stagesweep.run.context import Context


@dataclass
class TrainJointly(Fit):
    """Train on all clips or those of `sampler`, from encoder states if they were extracted."""

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return the metrics of the fit."""
        model: Any = run.model
        views = {split: split_view(run, split) for split in ("train", "val")}
        with error_rates_enabled(run, model, self):
            metrics = run.fit(model, self, run.stage, views)
        run.save_weights()
        return metrics
