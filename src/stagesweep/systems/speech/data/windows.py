"""Windows of clips: their features and tokens, read when a batch needs them."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stagesweep.data.loader import LoaderView
from stagesweep.systems.speech.data.features import Cepstra, Heard, padded
from stagesweep.systems.speech.data.tokens import SpeechSpec

# What a transcript has no place for: token targets that count for nothing.
IGNORED = -100


class Samples:
    """Windows of clips by number: `mel` (bands, frames), `frames` (how many are not padding),
    `tokens` and `labels` (longest).

    `tokens` is what the decoder reads, `labels` what it is to write, ``IGNORED`` elsewhere.
    """

    def __init__(
        self,
        source: Heard | Cepstra,
        pieces: Sequence[tuple[int, float, float]],
        texts: Sequence[Sequence[int]],
        spec: SpeechSpec,
    ) -> None:
        self.source, self.pieces, self.spec = source, list(pieces), spec
        self.texts = [list(text) for text in texts]

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        frames = self.source.features(*self.pieces[number])
        tokens, labels = self.targets(number)
        return {
            "mel": torch.from_numpy(padded(frames, self.spec.frames)),
            "frames": torch.tensor(max(1, min(len(frames) - 1, self.spec.frames))),
            "tokens": tokens,
            "labels": labels,
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
        return hashlib.sha256(text.encode()).hexdigest()


class SpeechView(LoaderView):
    """Windows of clips that are read when a batch needs them. `rows` are those of `samples` that
    the view has, all for None; columns known without reading are `speaker`, `stratum` and `clip`.
    """

    samples: Samples

    def take(self, rows: Tensor) -> "SpeechView":
        """Some windows, as a view of their own."""
        own = rows.tolist()
        samples = Samples(
            self.samples.source,
            [self.samples.pieces[row] for row in own],
            [self.samples.texts[row] for row in own],
            self.samples.spec,
        )
        columns = {n: c[rows] for n, c in self.columns.items() if n != "index"}
        return SpeechView(samples, columns)

    def with_columns(self, columns: Mapping[str, Tensor]) -> "SpeechView":
        """The same windows with more columns that are known without reading."""
        own = {name: column for name, column in self.columns.items() if name != "index"}
        return SpeechView(self.samples, {**own, **columns})
