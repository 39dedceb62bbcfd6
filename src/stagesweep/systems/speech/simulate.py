"""SIMULATED speech: formant-like tones for each word, which every stratum distorts in its own way.

Nothing in it is measured. A word is two vowels of five, so that there are 25 words; a clip is one
to three of them. A speaker has a pitch, a length of the vocal tract and a tempo. Strata differ in
two ways, both known:

* a voice that can be heard in every frame: breathy (noise), muffled (high formants damped), tremor
  (amplitude and pitch waver) and strained (a flat spectrum, a high pitch);
* a substitution: in stratum number s vowel v is spoken as vowel v + s + 1 (modulo 5). The same
  sound means another word in each stratum, as where speech sounds are consistently replaced by
  others. Typical speech has neither.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.signal import lfilter

from stagesweep.base.errors import UserError
from stagesweep.systems.speech.data.audio import Wave
from stagesweep.systems.speech.data.dataset import Columns, Speech
from stagesweep.systems.speech.data.features import RATE
from stagesweep.systems.speech.data.split import SPLITS, by_speaker

# First and second formant in Hz (Peterson & Barney 1952, table II, men: i, e, a, o, u).
VOWELS = {"i": (270, 2290), "e": (530, 1840), "a": (730, 1090), "o": (570, 840), "u": (300, 870)}
THIRD = 2500.0
STRATA = ("breathy", "muffled", "tremor", "strained")
TYPICAL = "typical"
CONSONANTS = ("b", "d", "g", "k", "l")
# The most harmonics, and the frequency above which there are none.
HARMONICS, HIGHEST = 40, 4000.0


@dataclass(frozen=True)
class Synthesiser:
    """Clips by number: `words` of each are pairs of vowels, `voices` those of its speaker."""

    words: list[list[tuple[int, int]]]
    voices: list["Voice"]
    strata: list[str]
    seed: int
    substitution: bool = True

    def key(self, row: int) -> str:
        """Everything that a clip follows from, beside the code."""
        words, voice = self.words[row], self.voices[row]
        return f"simulated/{words}/{voice}/{self.strata[row]}/{self.substitution}/{self.seed}/{row}"

    def wave(self, row: int, rate: int, start: float, stop: float) -> Wave:
        """Samples (n,) at `rate` Hz."""
        random = np.random.default_rng([self.seed, 7, row])
        stratum = self.strata[row]
        shift = STRATA.index(stratum) + 1 if stratum in STRATA and self.substitution else 0
        wave = spoken(self.words[row], self.voices[row], stratum, shift, rate, random)
        return wave[round(start * rate) : round(stop * rate)]

    def seconds(self, row: int) -> float:
        """How long a clip is."""
        stretch = self.voices[row].tempo
        return length(len(self.words[row]), stretch)


@dataclass(frozen=True)
class Voice:
    """A speaker: pitch in Hz, factor of all formants, and of all durations."""

    pitch: float
    tract: float
    tempo: float


def voice(random: np.random.Generator) -> Voice:
    """A speaker at random."""
    pitch, tract, tempo = random.uniform((95.0, 0.92, 0.9), (210.0, 1.08, 1.1)).tolist()
    return Voice(round(pitch, 2), round(tract, 4), round(tempo, 3))


# Seconds of a vowel, between words, and before and after a clip.
VOWEL, GAP, EDGE = 0.11, 0.06, 0.04


def length(words: int, tempo: float) -> float:
    """Seconds of a clip."""
    return 2 * EDGE + tempo * (words * 2 * VOWEL + (words - 1) * GAP)


def spoken(
    words: list[tuple[int, int]],
    voice: Voice,
    stratum: str,
    shift: int,
    rate: int,
    random: np.random.Generator,
) -> Wave:
    """A clip as a stratum speaks it, vowels replaced by those `shift` on: harmonics of a pitch, as
    loud as formants let them be.
    """
    count = round(length(len(words), voice.tempo) * rate)
    times = np.arange(count) / rate
    steps = np.arange(0.0, times[-1] + 1.0 / RATE, 1.0 / RATE)
    loud, formants = _course(words, voice, shift, steps)
    pitch = voice.pitch * (1.3 if stratum == "strained" else 1.0)
    pitch *= 1 + 0.05 * np.sin(2 * np.pi * (1.5 * steps + random.random()))
    if stratum == "tremor":
        sway = np.sin(2 * np.pi * (9.0 * steps + random.random()))
        loud, pitch = loud * (1 + 0.8 * sway), pitch * (1 + 0.04 * sway)
    wave = _harmonics(np.broadcast_to(pitch, steps.shape), loud, formants, steps, times, stratum)
    noise = random.standard_normal(count)
    wave += 0.002 * noise
    if stratum == "breathy":
        wave += 0.12 * np.interp(times, steps, loud + 0.15) * noise
    if stratum == "muffled":  # one pole at 500 Hz
        decay = np.exp(-2 * np.pi * 500.0 / rate)
        wave = lfilter([1 - decay], [1, -decay], wave)
    found: Wave = (0.3 * wave / max(float(np.abs(wave).max()), 1e-9)).astype(np.float32)
    return found


def _course(
    words: list[tuple[int, int]], voice: Voice, shift: int, steps: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Loudness (s,) and formants (s, 3) in Hz, at times `steps` (s,)."""
    targets = np.array(list(VOWELS.values()), float)
    vowel, gap = VOWEL * voice.tempo, GAP * voice.tempo
    at, hertz, borders = EDGE, [], []
    for first, second in words:
        for number, kind in enumerate((first, second)):
            middle = at + (number + 0.5) * vowel
            hertz.append((middle, *targets[(kind + shift) % len(targets)], THIRD))
        borders.append((at, at + 2 * vowel))
        at += 2 * vowel + gap
    known = np.array(hertz)
    formants = np.stack([np.interp(steps, known[:, 0], known[:, n]) for n in (1, 2, 3)], axis=1)
    loud = np.zeros_like(steps)
    for start, stop in borders:
        rise = np.clip(np.minimum(steps - start, stop - steps) / 0.02, 0, 1)
        loud = np.maximum(loud, np.sin(0.5 * np.pi * rise))
    return loud, formants * voice.tract


def _harmonics(
    pitch: NDArray[Any],
    loud: NDArray[Any],
    formants: NDArray[Any],
    steps: NDArray[Any],
    times: NDArray[Any],
    stratum: str,
) -> NDArray[np.float64]:
    """The sum of the harmonics of a pitch (s,), each as strong as three resonances let it be."""
    widths = np.array([80.0, 110.0, 160.0])
    tilt = 0.15 if stratum == "strained" else 0.9  # of the source: 1 / harmonic ** tilt
    every = round(1.0 / (RATE * (times[1] - times[0])))
    between = np.arange(every) / every

    def at_times(values: NDArray[Any]) -> NDArray[Any]:
        """Values (s,) of the steps, interpolated linearly to the times."""
        ahead = np.append(values[1:], values[-1])
        found = values[:, None] + (ahead - values)[:, None] * between
        return found.ravel()[: len(times)]

    turns = np.cumsum(at_times(pitch)) * (times[1] - times[0])
    turn = np.exp(2j * np.pi * turns).astype(np.complex64)
    wave, power = np.zeros_like(times), np.ones_like(turn)
    for harmonic in range(1, HARMONICS + 1):
        power = power * turn
        frequency = harmonic * pitch
        if frequency.min() > HIGHEST:
            break
        away = (frequency[:, None] - formants) / widths
        strength = (np.array([1.0, 0.7, 0.35]) / (1 + away**2)).sum(1) + 0.01
        strength = strength * loud * harmonic**-tilt * (frequency < HIGHEST)
        wave += at_times(strength) * power.imag
    return wave


def simulated_speech(
    speakers: int = 10,
    clips: int = 30,
    strata: int = 4,
    typical_speakers: int = 24,
    typical_clips: int = 40,
    most_words: int = 3,
    substitution: bool = True,
    seed: int = 0,
    bands: int = 40,
    seconds: float = 0.96,
    vocabulary: int = 64,
    fraction: float = 1.0,
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
    split_seed: int = 0,
) -> Speech:
    """Simulated speech: `clips` of each of `speakers` of each of `strata`, and typical speech.

    Typical speech is in the splits `typical` and `typical_val` (a fifth of its speakers); of the
    strata whole speakers are held out. Clips have one to `most_words` words; without `substitution`
    strata differ by their voices alone. The rest is as in `Speech`.
    """
    if not 1 <= strata <= len(STRATA):
        raise UserError(f"data.strata={strata} must be 1 to {len(STRATA)}")
    random = np.random.default_rng([seed, 5])
    rows: list[dict[str, Any]] = []
    words: list[list[tuple[int, int]]] = []
    voices: list[Voice] = []
    for stratum in (*STRATA[:strata], TYPICAL):
        many, each = (typical_speakers, typical_clips) if stratum == TYPICAL else (speakers, clips)
        for number in range(many):
            own, typical = voice(random), "typical_val" if number % 5 == 4 else "typical"
            for _ in range(each):
                said = random.integers(len(VOWELS), size=(random.integers(1, most_words + 1), 2))
                words.append([(int(a), int(b)) for a, b in said])
                voices.append(own)
                place = {"speaker": f"{stratum} {number}", "stratum": stratum}
                rows.append({"transcript": text(words[-1]), "split": typical, **place})
    table = pd.DataFrame(rows)
    chosen = np.flatnonzero(table["stratum"] != TYPICAL)
    dealt = by_speaker(
        *(table[name].iloc[chosen].astype("category").cat.codes.to_numpy(np.int64)
          for name in ("speaker", "stratum")),
        dict(zip(SPLITS, fractions, strict=True)), split_seed, sorted(STRATA[:strata]),
    )  # fmt: skip
    for name, members in dealt.items():
        table.loc[chosen[members], "split"] = name
    source = Synthesiser(words, voices, table["stratum"].tolist(), seed, substitution)
    return Speech(
        table,
        Columns("transcript", speaker="speaker", stratum="stratum", split="split"),
        normaliser="basic",
        vocabulary=vocabulary,
        bands=bands,
        seconds=seconds,
        fraction=fraction,
        split_seed=split_seed,
        source=source,
    )


def text(words: list[tuple[int, int]]) -> str:
    """How words are written: a consonant stands for the first vowel of each."""
    return " ".join(CONSONANTS[first] + list(VOWELS)[second] for first, second in words)
