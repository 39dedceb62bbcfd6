"""Stage that trains a small Whisper from random weights, without experts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stagesweep.stage.fit import Fit
from stagesweep.systems.speech.data.split import TYPICAL
from stagesweep.systems.speech.stage.fits import error_rates_enabled

if TYPE_CHECKING:
    from stagesweep.run.context import Context


@dataclass
class Pretrain(Fit):
    """Train the base model, without gate and experts, on typical speech if the data has it.

    Otherwise on the training split. A Whisper checkpoint does not need this stage.
    """

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return the metrics of the fit."""
        model: Any = run.model
        names = [name for name in TYPICAL if name in run.data.splits]
        chosen = TYPICAL if len(names) == len(TYPICAL) else ("train", "val")
        views = dict(zip(("train", "val"), map(run.data.split, chosen), strict=True))
        with model.mixed("none"), error_rates_enabled(run, model, self):
            metrics = run.fit(model, self, run.stage, views)
        run.save_weights()
        return metrics
