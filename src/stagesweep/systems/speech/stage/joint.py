"""The stage that trains the experts and the gate together."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stagesweep.stage.fit import Fit
from stagesweep.systems.speech.stage.fits import heard, measured

if TYPE_CHECKING:
    from stagesweep.run.context import Context


@dataclass
class TrainJointly(Fit):
    """Train on all clips, or on those of its `sampler`, from states where they were extracted."""

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return what a fit returns."""
        model: Any = run.model
        views = {split: heard(run, split) for split in ("train", "val")}
        with measured(run, model, self):
            metrics = run.fit(model, self, run.stage, views)
        run.save_weights()
        return metrics
