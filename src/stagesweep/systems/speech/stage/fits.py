"""What the fits of this system have in common: what they hear, and error rates while they train."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagesweep.base.errors import UserError
from stagesweep.config import schema
from stagesweep.parallel.process_group import current_group
from stagesweep.systems.speech import metric
from stagesweep.systems.speech.data.dataset import Speech
from stagesweep.systems.speech.data.windows import EncoderStates, SpeechView
from stagesweep.systems.speech.transcribe import joined

if TYPE_CHECKING:
    from stagesweep.run.context import Context


def heard(run: "Context", split: str) -> SpeechView:
    """A split, with the encoder's states where an extraction has kept them."""
    view: SpeechView = run.data.split(split)
    if not run.has("states.npy"):
        return view
    table = run.load("extracted.csv")
    own = table[table["split"] == split]
    rows = np.full(len(view), -1)
    rows[own["row"].to_numpy()] = own.index.to_numpy()
    return view.with_states(
        EncoderStates(run.find("states.npy"), np.load(run.find("frames.npy")), rows)
    )


@dataclass
class ErrorRates:
    """A metric of a fit: `wer` and `cer` of what the model hears in validation clips, decoded
    greedily, all errors over all words (characters) of normalised text.

    Works in the fits of this system alone, which tell it what tokens mean.
    """

    reads = ("decoded", "clip")

    def __call__(self, arrays: dict[str, NDArray[Any]]) -> dict[str, float]:
        """Error rates of `decoded` (n, L), tokens, in windows of the clips `clip` (n,)."""
        data: Speech = self.__dict__["data"]
        said = [data.tokenizer.decode(row) for row in arrays["decoded"].tolist()]
        told = joined(data, arrays["clip"], said)
        sums = metric.errors(told["reference"], told["hypothesis"]).sum()
        return {
            "wer": float(sums["word_errors"] / sums["words"]),
            "cer": float(sums["character_errors"] / sums["characters"]),
        }

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: other processes take part in a fit, and compute no metric."""
        return {}


@contextmanager
def measured(run: "Context", model: Any, settings: schema.Fit) -> Iterator[None]:
    """For a fit: its `ErrorRates` know the tokens, and the model decodes what they read."""
    rates = [each for each in settings.metrics.values() if isinstance(each, ErrorRates)]
    if rates and run.profile.shard and current_group().world_size > 1:
        raise UserError(
            f"stage.{run.stage}.metrics: a sharded model is not decoded while it trains; leave "
            "ErrorRates out, or set hardware.parallel=replicate"
        )
    for each in rates:
        each.__dict__["data"] = run.data
    before, model.decode_in_evaluation = model.decode_in_evaluation, bool(rates)
    try:
        yield
    finally:
        model.decode_in_evaluation = before
