"""Windows of clips: their features and tokens, read when a batch needs them."""

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
from stagesweep.systems.speech.data.features import Cepstra, Heard, padded
from stagesweep.systems.speech.data.tokens import SpeechSpec

# What a transcript has no place for: token targets that count for nothing.
IGNORED = -100


@dataclass(frozen=True)
class States:
    """What the encoder made of windows, in a file on disk: `rows` (n,) are those of the windows,
    negative where there is none; `frames` (rows,) is how many frames each was of.
    """

    path: Path
    frames: NDArray[np.int64]
    rows: NDArray[np.int64]

    def __getitem__(self, number: int) -> NDArray[np.float16]:
        """The states (positions, width) of a window."""
        states: NDArray[np.float16] = np.array(_opened(self.path)[self.rows[number]])
        return states

    def take(self, rows: NDArray[np.int64]) -> "States":
        """Those of some windows."""
        return replace(self, rows=self.rows[rows])


@cache
def _opened(path: Path) -> Any:
    """An array on disk, opened once in each process."""
    return np.load(path, mmap_mode="r")


class Samples:
    """Windows of clips by number: `mel` (bands, frames), `frames` (how many are not padding),
    `tokens` and `labels` (longest). Where `states` has all of them, there is no `mel`, but `states`
    (positions, width).

    `tokens` is what the decoder reads, `labels` what it is to write, ``IGNORED`` elsewhere.
    """

    def __init__(
        self,
        source: Heard | Cepstra,
        pieces: Sequence[tuple[int, float, float]],
        texts: Sequence[Sequence[int]],
        spec: SpeechSpec,
        states: States | None = None,
    ) -> None:
        self.source, self.pieces, self.spec = source, list(pieces), spec
        self.texts = [list(text) for text in texts]
        self.states = states
        self.encoded = (
            states is not None and len(self.pieces) > 0 and bool((states.rows >= 0).all())
        )

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        tokens, labels = self.targets(number)
        return {**self.heard(number), "tokens": tokens, "labels": labels}

    def heard(self, number: int) -> dict[str, Tensor]:
        """What a model hears of a window: `mel` or `states`, and `frames`."""
        if self.states is not None and self.encoded:
            count = self.states.frames[self.states.rows[number]]
            states = torch.from_numpy(self.states[number])
            return {"states": states, "frames": torch.tensor(int(count))}
        frames = self.source.features(*self.pieces[number])
        return {
            "mel": torch.from_numpy(padded(frames, self.spec.frames)),
            "frames": torch.tensor(max(1, min(len(frames) - 1, self.spec.frames))),
        }

    def targets(self, number: int) -> tuple[Tensor, Tensor]:
        """What the decoder reads and writes for a window, both (longest,)."""
        known = self.spec.tokens
        tokens = torch.full((known.longest,), known.pad)
        labels = torch.full((known.longest,), IGNORED)
        prefix, text = list(known.prefix), self.texts[number]
        tokens[: len(prefix) + len(text)] = torch.tensor(prefix + text)
        if text:
            first = len(prefix) - 1
            labels[first : first + len(text) + 1] = torch.tensor([*text, known.end])
        return tokens, labels

    def digest(self, number: int) -> str:
        """Hash of what a window holds: its audio, how its features are computed, its tokens."""
        text = f"{self.source.key(*self.pieces[number])}/{self.texts[number]}"
        text += "/states" if self.encoded else ""
        return hashlib.sha256(text.encode()).hexdigest()


class SpeechView(LoaderView):
    """Windows of clips that are read when a batch needs them. `rows` are those of `samples` that
    the view has, all for None; columns known without reading are `speaker`, `stratum` and `clip`.
    """

    samples: Samples

    def take(self, rows: Tensor) -> "SpeechView":
        """Some windows, as a view of their own."""
        own = rows.tolist()
        states = self.samples.states
        samples = Samples(
            self.samples.source,
            [self.samples.pieces[row] for row in own],
            [self.samples.texts[row] for row in own],
            self.samples.spec,
            None if states is None else states.take(rows.numpy()),
        )
        columns = {n: c[rows] for n, c in self.columns.items() if n != "index"}
        return SpeechView(samples, columns)

    def with_columns(self, columns: Mapping[str, Tensor]) -> "SpeechView":
        """The same windows with more columns that are known without reading."""
        own = {name: column for name, column in self.columns.items() if name != "index"}
        return SpeechView(self.samples, {**own, **columns})

    def with_states(self, states: States) -> "SpeechView":
        """The same windows with what the encoder made of them."""
        own = self.samples
        samples = Samples(own.source, own.pieces, own.texts, own.spec, states)
        return SpeechView(samples, {n: c for n, c in self.columns.items() if n != "index"})
