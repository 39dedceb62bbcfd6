"""Shared by the fits of this system: views with encoder states, error rates during training."""

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
from stagesweep.systems.speech.stage.decoding import transcript_table

if TYPE_CHECKING:
    from stagesweep.run.context import Context


def split_view(run: "Context", split: str) -> SpeechView:
    """Return the view of a split, with encoder states if they were extracted."""
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
    """Metrics of a fit: `wer` and `cer`, errors per word and per character of normalised text, with
    greedy decoding of validation clips.

    Only for the fits of this system, which set the tokenizer.
    """

    reads = ("decoded", "clip")

    def __call__(self, arrays: dict[str, NDArray[Any]]) -> dict[str, float]:
        """Return error rates of tokens `decoded` (n, L) in windows of the clips `clip` (n,)."""
        data: Speech = self.__dict__["data"]
        texts = [data.tokenizer.decode(row) for row in arrays["decoded"].tolist()]
        table = transcript_table(data, arrays["clip"], texts)
        sums = metric.errors(table["reference"], table["hypothesis"]).sum()
        return {
            "wer": float(sums["word_errors"] / sums["words"]),
            "cer": float(sums["character_errors"] / sums["characters"]),
        }

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the data: other processes of a fit compute no metrics."""
        return {}


@contextmanager
def error_rates_enabled(run: "Context", model: Any, settings: schema.Fit) -> Iterator[None]:
    """Context of a fit: gives its `ErrorRates` the data, and the model decodes for them."""
    rates = [each for each in settings.metrics.values() if isinstance(each, ErrorRates)]
    if rates and run.profile.shard and current_group().world_size > 1:
        raise UserError(
            f"stage.{run.stage}.metrics: a sharded model cannot be decoded during training; remove "
            "ErrorRates, or set hardware.parallel=replicate"
        )
    for each in rates:
        each.__dict__["data"] = run.data
    before, model.decode_in_evaluation = model.decode_in_evaluation, bool(rates)
    try:
        yield
    finally:
        model.decode_in_evaluation = before
