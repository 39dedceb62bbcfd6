"""The stage that trains a small Whisper from nothing, before there are experts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stagesweep.stage.fit import Fit
from stagesweep.systems.speech.data.split import TYPICAL
from stagesweep.systems.speech.stage.fits import measured

if TYPE_CHECKING:
    from stagesweep.run.context import Context


@dataclass
class Pretrain(Fit):
    """Train the base, without gate and experts, on typical speech where the data has some.

    Otherwise on the training split. A checkpoint of Whisper needs no such stage.
    """

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return what a fit returns."""
        model: Any = run.model
        names = [name for name in TYPICAL if name in run.data.splits]
        chosen = TYPICAL if len(names) == len(TYPICAL) else ("train", "val")
        views = dict(zip(("train", "val"), map(run.data.split, chosen), strict=True))
        with model.mixed("none"), measured(run, model, self):
            metrics = run.fit(model, self, run.stage, views)
        run.save_weights()
        return metrics
