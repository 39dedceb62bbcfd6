"""Decode the clips of a split."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from stagesweep.core.predict import to_device
from stagesweep.hardware.out_of_memory import OutOfMemoryRetry
from stagesweep.parallel.micro_batches import split as split_batch
from stagesweep.systems.speech.data.dataset import Speech

if TYPE_CHECKING:
    from stagesweep.run.context import Context


def transcribe(
    run: "Context", model: Any, split: str, beams: int = 1, batch_size: int = 64
) -> tuple[pd.DataFrame, np.ndarray[Any, Any]]:
    """What a model hears in each clip of a split, and its gate's probabilities (n, E).

    A row for each clip: `split`, `id`, `speaker`, `stratum`, `reference`, `hypothesis` (both
    normalised) and the `expert` of its first window. What was heard in several windows is joined.
    """
    data, profile = run.data, run.profile
    view = run.prepared(data.split(split))
    retry = OutOfMemoryRetry(profile.micro_batch, "decoding", profile)
    said: list[str] = []
    experts, probabilities = [], []
    model.eval()
    batches = view.batches(batch_size)
    for batch in run.progress(batches, f"decodes {split}"):
        attempt = partial(decoded, model, batch, profile, beams)
        for tokens, own, gate in retry.run(attempt, batch_size):
            said += [data.tokenizer.decode(row) for row in tokens]
            experts.append(own)
            probabilities.append(gate)
    run.measured["oom"] += retry.events
    clip = view["clip"].numpy()
    first = ~pd.Series(clip).duplicated().to_numpy()
    table = joined(data, clip, said)
    table.insert(0, "split", split)
    return table.assign(expert=np.concatenate(experts)[first]), np.concatenate(probabilities)[first]


def joined(data: Speech, clip: np.ndarray[Any, Any], said: Sequence[str]) -> pd.DataFrame:
    """A row for each clip: id, speaker, stratum, reference and hypothesis (both normalised).

    `clip` (n,) is the clip of each window, `said` what was heard in it.
    """
    rows = pd.DataFrame({"clip": clip, "said": list(said)})
    whole = rows.groupby("clip", sort=False)["said"].agg(" ".join)
    clips = data.clips.iloc[whole.index]
    return pd.DataFrame(
        {
            **{name: clips[name].to_numpy(str) for name in ("id", "speaker", "stratum")},
            "reference": clips["reference"].to_numpy(str),
            "hypothesis": [data.normalise(text) for text in whole],
        }
    )


def decoded(
    model: Any, batch: dict[str, torch.Tensor], profile: Any, beams: int, size: int
) -> list[tuple[list[list[int]], Any, Any]]:
    """Tokens, experts and probabilities of a batch, in parts of at most `size` clips."""
    found = []
    for part in split_batch(batch, size):
        own = to_device({name: part[name] for name in ("mel", "frames")}, profile.device)
        with torch.autocast(
            profile.device.type, profile.autocast, enabled=profile.autocast is not None
        ):
            tokens, experts, probabilities = model.transcribe(own, beams)
        found.append((tokens.tolist(), experts.cpu().numpy(), probabilities.float().cpu().numpy()))
    return found
