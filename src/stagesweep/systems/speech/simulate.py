"""SIMULATED speech: words of synthetic vowels, which each stratum distorts in a known way.

It contains no recordings. A word is two of five vowels, so there are 25 words; a clip has two
words. Speakers differ in pitch, formants and tempo. Strata differ in two ways:

* voice: breathy, muffled (damped high formants), tremor (varying amplitude and pitch) or strained
  (flat spectrum, high pitch), each with noise in a frequency band of its own;
* substitution: stratum number s (from 1) pronounces vowel v as vowel v + s (modulo 5). So the same
  sound means another word in each stratum, as in speech with consistent sound substitutions.

Typical speakers have a plain voice and no substitution.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.signal import lfilter

from stagesweep.base.errors import UserError
from stagesweep.store.fingerprint import source_hash
from stagesweep.systems.speech.data.audio import Wave
from stagesweep.systems.speech.data.dataset import Columns, Speech
from stagesweep.systems.speech.data.features import RATE
from stagesweep.systems.speech.data.split import SPLITS, by_speaker
from stagesweep.systems.speech.data.split import TYPICAL as TYPICAL_SPLITS

# First and second formant in Hz (Peterson & Barney 1952, table II, men).
VOWELS = {"i": (270, 2290), "e": (530, 1840), "a": (730, 1090), "o": (570, 840), "u": (300, 870)}
THIRD_FORMANT = 2500.0
STRATA = ("breathy", "muffled", "tremor", "strained")
TYPICAL = "typical"
# Noise of each voice: lowest and highest frequency in Hz, amplitude.
NOISE = {
    "breathy": (0, 8000, 1.0),
    "muffled": (0, 300, 2.0),
    "tremor": (600, 1500, 1.0),
    "strained": (2500, 8000, 1.0),
    "typical": (0, 8000, 0.0),
}
CONSONANTS = ("b", "d", "g", "k", "l")
# Maximal number of harmonics and their maximal frequency in Hz.
MAX_HARMONICS, MAX_FREQUENCY = 40, 4000.0


@dataclass(frozen=True)
class Synthesiser:
    """Clips by number, all of `length` seconds: the pronounced words (pairs of vowels), the speaker
    and the voice (one of `STRATA`, or typical) of each.
    """

    words: list[list[tuple[int, int]]]
    speakers: list["Speaker"]
    voices: list[str]
    seed: int
    length: float

    def key(self, row: int) -> str:
        """Identify a clip: its settings and the code that synthesises it."""
        about = (self.words[row], self.speakers[row], self.voices[row], self.length, self.seed, row)
        return f"{_source()}/{about}"

    def wave(self, row: int, rate: int, start: float, stop: float) -> Wave:
        """Return samples (n,) at `rate` Hz."""
        random = np.random.default_rng([self.seed, 7, row])
        wave = synthesise(
            self.words[row], self.speakers[row], self.voices[row], self.length, rate, random
        )
        return wave[round(start * rate) : round(stop * rate)]

    def seconds(self, row: int) -> float:
        """Length of a clip in seconds."""
        return self.length


@cache
def _source() -> str:
    """Hash of this module and of its imports."""
    return source_hash(__name__)


@dataclass(frozen=True)
class Speaker:
    """A speaker: pitch in Hz, scale of formants, scale of durations, amplitude of the noise."""

    pitch: float
    formant_scale: float
    tempo: float
    noise: float = 0.0


def draw_speaker(random: np.random.Generator, noise: float) -> Speaker:
    """Draw a speaker."""
    pitch, scale, tempo = random.uniform((95.0, 0.92, 0.9), (210.0, 1.08, 1.1)).tolist()
    return Speaker(round(pitch, 2), round(scale, 4), round(tempo, 3), noise)


# Seconds of a vowel, of the gap between words, and of silence at both ends.
VOWEL, GAP, EDGE = 0.11, 0.06, 0.04


def min_length(words: int, tempo: float) -> float:
    """Minimum length of a clip in seconds."""
    return 2 * EDGE + tempo * (words * 2 * VOWEL + (words - 1) * GAP)


def synthesise(
    words: list[tuple[int, int]],
    speaker: Speaker,
    voice: str,
    length: float,
    rate: int,
    random: np.random.Generator,
) -> Wave:
    """Synthesise words in a clip of `length` seconds, by harmonics that formants filter."""
    count = round(length * rate)
    times = np.arange(count) / rate
    steps = np.arange(0.0, times[-1] + 1.0 / RATE, 1.0 / RATE)
    start = EDGE + random.random() * max(length - min_length(len(words), speaker.tempo), 0.0)
    loud, formants = _contours(words, speaker, start, steps)
    pitch = np.full_like(steps, speaker.pitch * (1.3 if voice == "strained" else 1.0))
    pitch *= 1 + 0.05 * np.sin(2 * np.pi * (1.5 * steps + random.random()))
    if voice == "tremor":
        sway = np.sin(2 * np.pi * (11.0 * steps + random.random()))
        loud, pitch = loud * np.clip(0.5 + sway, 0, None), pitch * (1 + 0.04 * sway)
    wave = _harmonics(pitch, loud, formants, steps, times, 0.15 if voice == "strained" else 0.9)
    if voice == "muffled":
        wave = low_pass(wave, 1500.0, rate)
    noise = random.standard_normal(count)
    wave += 0.002 * noise
    lowest, highest, loudness = NOISE[voice]
    wave += speaker.noise * loudness * band_pass(noise, lowest, highest, rate)
    found: Wave = (0.3 * wave / max(float(np.abs(wave).max()), 1e-9)).astype(np.float32)
    return found


def low_pass(wave: NDArray[Any], hertz: float, rate: int) -> NDArray[Any]:
    """Filter a wave by a one-pole low-pass."""
    decay = np.exp(-2 * np.pi * hertz / rate)
    found: NDArray[Any] = lfilter([1 - decay], [1, -decay], wave)
    return found


def band_pass(wave: NDArray[Any], lowest: float, highest: float, rate: int) -> NDArray[Any]:
    """Keep the frequencies of a wave from `lowest` to `highest` Hz."""
    spectrum = np.fft.rfft(wave)
    hertz = np.fft.rfftfreq(len(wave), 1 / rate)
    spectrum[(hertz < lowest) | (hertz > highest)] = 0
    return np.fft.irfft(spectrum, len(wave))


def _contours(
    words: list[tuple[int, int]], speaker: Speaker, start: float, steps: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return loudness (s,) and formants (s, 3) in Hz at the times `steps` (s,)."""
    targets = np.array(list(VOWELS.values()), float)
    vowel, gap = VOWEL * speaker.tempo, GAP * speaker.tempo
    time, hertz, borders = start, [], []
    for first, second in words:
        for number, kind in enumerate((first, second)):
            middle = time + (number + 0.5) * vowel
            hertz.append((middle, *targets[kind], THIRD_FORMANT))
        borders.append((time, time + 2 * vowel))
        time += 2 * vowel + gap
    known = np.array(hertz)
    formants = np.stack([np.interp(steps, known[:, 0], known[:, n]) for n in (1, 2, 3)], axis=1)
    loud = np.zeros_like(steps)
    for begin, end in borders:
        rise = np.clip(np.minimum(steps - begin, end - steps) / 0.02, 0, 1)
        loud = np.maximum(loud, np.sin(0.5 * np.pi * rise))
    return loud, formants * speaker.formant_scale


def _harmonics(
    pitch: NDArray[Any],
    loud: NDArray[Any],
    formants: NDArray[Any],
    steps: NDArray[Any],
    times: NDArray[Any],
    tilt: float,
) -> NDArray[np.float64]:
    """Sum the harmonics of a pitch (s,), filtered by three formants. The amplitude of harmonic h in
    the source is h^-tilt.
    """
    widths = np.array([80.0, 110.0, 160.0])
    every = round(1.0 / (RATE * (times[1] - times[0])))
    between = np.arange(every) / every

    def at_times(values: NDArray[Any]) -> NDArray[Any]:
        """Interpolate values (s,) at `steps` linearly to `times`."""
        ahead = np.append(values[1:], values[-1])
        found: NDArray[Any] = values[:, None] + (ahead - values)[:, None] * between
        return found.ravel()[: len(times)]

    turns = np.cumsum(at_times(pitch)) * (times[1] - times[0])
    turn = np.exp(2j * np.pi * turns).astype(np.complex64)
    wave, power = np.zeros_like(times), np.ones_like(turn)
    for harmonic in range(1, MAX_HARMONICS + 1):
        power = power * turn
        frequency = harmonic * pitch
        if frequency.min() > MAX_FREQUENCY:
            break
        away = (frequency[:, None] - formants) / widths
        strength = (np.array([1.0, 0.7, 0.35]) / (1 + away**2)).sum(1) + 0.01
        strength = strength * loud * harmonic**-tilt * (frequency < MAX_FREQUENCY)
        wave += at_times(strength) * power.imag
    return wave


@dataclass(frozen=True)
class SimulatedClip:
    """A clip: its words and their pronunciation (pairs of vowels), speaker, stratum and split."""

    words: list[tuple[int, int]]
    pronounced: list[tuple[int, int]]
    speaker: Speaker
    name: str
    stratum: str
    split: str


def simulated_speech(
    speakers: int = 10,
    clips: int = 30,
    strata: int = 4,
    typical_speakers: int = 30,
    typical_clips: int = 40,
    words_each: int = 2,
    voice: float = 0.4,
    substitution: bool = True,
    seed: int = 0,
    bands: int = 40,
    seconds: float = 0.64,
    vocabulary: int = 64,
    fraction: float = 1.0,
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
    split_seed: int = 0,
) -> Speech:
    """Simulate speech: `clips` of each of `speakers` of each of `strata`, and typical speech.

    Typical speech is in the splits `typical` and `typical_val` (a fifth of its speakers); other
    speakers are split by `fractions`. A clip has `words_each` words. `voice` is the amplitude of
    the noise of voices (that of speech is about 1). Without `substitution`, strata differ only in
    their voices. The other arguments are those of `Speech`.
    """
    if not 1 <= strata <= len(STRATA):
        raise UserError(f"data.strata={strata} must be 1 to {len(STRATA)}")
    if seconds < (least := min_length(words_each, 1.1)):
        raise UserError(
            f"data.seconds={seconds} is too short for data.words_each={words_each}; set it to "
            f"{least:.2f} or more"
        )
    random = np.random.default_rng([seed, 5])
    drawn: list[SimulatedClip] = []
    for stratum in STRATA[:strata]:
        shift = STRATA.index(stratum) + 1 if substitution else 0
        drawn += draw_clips(random, stratum, speakers, clips, words_each, voice, shift)
    drawn += draw_clips(random, TYPICAL, typical_speakers, typical_clips, words_each, voice, 0)
    source = Synthesiser(
        [clip.pronounced for clip in drawn], [clip.speaker for clip in drawn],
        [clip.stratum for clip in drawn], seed, seconds,
    )  # fmt: skip
    return Speech(
        clip_table(drawn, fractions, split_seed),
        Columns("transcript", speaker="speaker", stratum="stratum", split="split"),
        normaliser="basic", vocabulary=vocabulary, bands=bands, seconds=seconds,
        fraction=fraction, split_seed=split_seed, source=source,
    )  # fmt: skip


def draw_clips(
    random: np.random.Generator,
    stratum: str,
    speakers: int,
    clips: int,
    words_each: int,
    voice: float,
    shift: int,
) -> list[SimulatedClip]:
    """Draw `clips` of each of `speakers`; vowel v is pronounced as vowel v + `shift`."""
    found = []
    for number in range(speakers):
        noise = voice * (random.random() if stratum == TYPICAL else 1.0)
        speaker = draw_speaker(random, round(noise, 3))
        for _ in range(clips):
            vowels = random.integers(len(VOWELS), size=(words_each, 2))
            words, pronounced = (
                [(int(a), int(b)) for a, b in pairs]
                for pairs in (vowels, (vowels + shift) % len(VOWELS))
            )
            split = TYPICAL_SPLITS[number % 5 == 4]
            name = f"{stratum} {number}"
            found.append(SimulatedClip(words, pronounced, speaker, name, stratum, split))
    return found


def clip_table(
    clips: list[SimulatedClip], fractions: tuple[float, float, float], seed: int
) -> pd.DataFrame:
    """Return transcript, split, speaker and stratum of clips; speakers of strata are split."""
    table = pd.DataFrame(
        {
            "transcript": [text(clip.words) for clip in clips],
            "split": [clip.split for clip in clips],
            "speaker": [clip.name for clip in clips],
            "stratum": [clip.stratum for clip in clips],
        }
    )
    chosen = np.flatnonzero(table["stratum"] != TYPICAL)
    own = table.iloc[chosen].astype("category")
    speaker, stratum = (own[n].cat.codes.to_numpy(np.int64) for n in ("speaker", "stratum"))
    names = [str(name) for name in own["stratum"].cat.categories]
    shares = dict(zip(SPLITS, fractions, strict=True))
    for name, rows in by_speaker(speaker, stratum, shares, seed, names).items():
        table.loc[chosen[rows], "split"] = name
    return table


def text(words: list[tuple[int, int]]) -> str:
    """Write words: a consonant stands for the first vowel."""
    return " ".join(CONSONANTS[first] + list(VOWELS)[second] for first, second in words)
