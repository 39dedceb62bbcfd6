"""Windows of clips: features and tokens, read when a batch needs them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stagesweep.data.loader import LoaderView
from stagesweep.systems.speech.data.features import CachedFeatures, Cepstra, padded
from stagesweep.systems.speech.data.tokens import SpeechSpec

# Label of padding tokens, ignored by the loss.
IGNORED = -100


@dataclass(frozen=True)
class EncoderStates:
    """Encoder states of windows, in a file on disk.

    `rows` (n,) are the rows of the windows in the file, negative for windows without states.
    `frames` (rows,) is the number of frames of each row.
    """

    path: Path
    frames: NDArray[np.int64]
    rows: NDArray[np.int64]

    def __getitem__(self, number: int) -> NDArray[np.float16]:
        """Return the states (positions, width) of a window."""
        states: NDArray[np.float16] = np.array(_open(self.path)[self.rows[number]])
        return states

    def take(self, rows: NDArray[np.int64]) -> "EncoderStates":
        """Select windows."""
        return replace(self, rows=self.rows[rows])


@cache
def _open(path: Path) -> Any:
    """Open an array on disk, once in each process."""
    return np.load(path, mmap_mode="r")


class Samples:
    """Windows of clips by number: `mel` (bands, frames), `frames` (number without padding), and
    `tokens` and `labels` (longest), the input and the targets of the decoder.

    Labels are ``IGNORED`` outside the transcript. If `states` covers all windows, samples have
    `states` (positions, width) instead of `mel`.
    """

    def __init__(
        self,
        source: CachedFeatures | Cepstra,
        windows: Sequence[tuple[int, float, float]],
        transcripts: Sequence[Sequence[int]],
        spec: SpeechSpec,
        states: EncoderStates | None = None,
    ) -> None:
        self.source, self.windows, self.spec = source, list(windows), spec
        self.transcripts = [list(tokens) for tokens in transcripts]
        self.states = states
        self.has_states = (
            states is not None and len(self.windows) > 0 and bool((states.rows >= 0).all())
        )

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        tokens, labels = self.targets(number)
        return {**self.inputs(number), "tokens": tokens, "labels": labels}

    def inputs(self, number: int) -> dict[str, Tensor]:
        """Return the inputs of the encoder (`mel`) or its `states`, and `frames`."""
        if self.states is not None and self.has_states:
            count = self.states.frames[self.states.rows[number]]
            states = torch.from_numpy(self.states[number])
            return {"states": states, "frames": torch.tensor(int(count))}
        frames = self.source.features(*self.windows[number])
        return {
            "mel": torch.from_numpy(padded(frames, self.spec.frames)),
            "frames": torch.tensor(max(1, min(len(frames) - 1, self.spec.frames))),
        }

    def targets(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the tokens that the decoder reads and its labels, both (longest,)."""
        special = self.spec.tokens
        tokens = torch.full((special.longest,), special.pad)
        labels = torch.full((special.longest,), IGNORED)
        prefix, text = list(special.prefix), self.transcripts[number]
        tokens[: len(prefix) + len(text)] = torch.tensor(prefix + text)
        if text:
            first = len(prefix) - 1
            labels[first : first + len(text) + 1] = torch.tensor([*text, special.end])
        return tokens, labels

    def digest(self, number: int) -> str:
        """Hash of a window: its audio, the settings of its features, its tokens."""
        text = f"{self.source.key(*self.windows[number])}/{self.transcripts[number]}"
        text += "/states" if self.has_states else ""
        return hashlib.sha256(text.encode()).hexdigest()


class SpeechView(LoaderView):
    """View of windows that are read when a batch needs them.

    The columns `speaker`, `stratum` and `clip` are in memory.
    """

    samples: Samples

    def take(self, rows: Tensor) -> "SpeechView":
        """Select windows."""
        own = rows.tolist()
        states = self.samples.states
        samples = Samples(
            self.samples.source,
            [self.samples.windows[row] for row in own],
            [self.samples.transcripts[row] for row in own],
            self.samples.spec,
            None if states is None else states.take(rows.numpy()),
        )
        columns = {n: c[rows] for n, c in self.columns.items() if n != "index"}
        return SpeechView(samples, columns)

    def with_columns(self, columns: Mapping[str, Tensor]) -> "SpeechView":
        """Add columns that are in memory."""
        own = {name: column for name, column in self.columns.items() if name != "index"}
        return SpeechView(self.samples, {**own, **columns})

    def with_states(self, states: EncoderStates) -> "SpeechView":
        """Add encoder states, which replace the features."""
        own = self.samples
        samples = Samples(own.source, own.windows, own.transcripts, own.spec, states)
        return SpeechView(samples, {n: c for n, c in self.columns.items() if n != "index"})
