"""Decoding of the clips of a split, which several stages share."""

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
    """Decode a split; returns a row for each clip, and the gate's probabilities (n, E).

    Columns: `split`, `id`, `speaker`, `stratum`, `reference`, `hypothesis` (both normalised) and
    the `expert` of the first window. Texts of several windows are joined.
    """
    data, profile = run.data, run.profile
    view = run.prepared(data.split(split))
    retry = OutOfMemoryRetry(profile.micro_batch, "decoding", profile)
    texts: list[str] = []
    experts, probabilities = [], []
    model.eval()
    batches = view.batches(batch_size)
    for batch in run.progress(batches, f"decoding {split}"):
        attempt = partial(decode_batch, model, batch, profile, beams)
        for tokens, own, gate in retry.run(attempt, batch_size):
            texts += [data.tokenizer.decode(row) for row in tokens]
            experts.append(own)
            probabilities.append(gate)
    run.measured["oom"] += retry.events
    clip = view["clip"].numpy()
    first = ~pd.Series(clip).duplicated().to_numpy()
    table = transcript_table(data, clip, texts)
    table.insert(0, "split", split)
    return table.assign(expert=np.concatenate(experts)[first]), np.concatenate(probabilities)[first]


def transcript_table(
    data: Speech, clip: np.ndarray[Any, Any], texts: Sequence[str]
) -> pd.DataFrame:
    """Return a row for each clip: id, speaker, stratum, reference and hypothesis (both normalised).

    `clip` (n,) is the clip of each window, `texts` its transcript.
    """
    rows = pd.DataFrame({"clip": clip, "text": list(texts)})
    joined = rows.groupby("clip", sort=False)["text"].agg(" ".join)
    clips = data.clips.iloc[joined.index]
    return pd.DataFrame(
        {
            **{name: clips[name].to_numpy(str) for name in ("id", "speaker", "stratum")},
            "reference": clips["reference"].to_numpy(str),
            "hypothesis": [data.normalise(text) for text in joined],
        }
    )


def decode_batch(
    model: Any, batch: dict[str, torch.Tensor], profile: Any, beams: int, size: int
) -> list[tuple[list[list[int]], Any, Any]]:
    """Return tokens, experts and probabilities of a batch, in parts of at most `size` clips."""
    found = []
    for part in split_batch(batch, size):
        own = to_device({name: part[name] for name in ("mel", "frames")}, profile.device)
        with torch.autocast(
            profile.device.type, profile.autocast, enabled=profile.autocast is not None
        ):
            tokens, experts, probabilities = model.transcribe(own, beams)
        found.append((tokens.tolist(), experts.cpu().numpy(), probabilities.float().cpu().numpy()))
    return found
