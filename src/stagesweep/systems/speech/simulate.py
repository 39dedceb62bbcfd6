"""SIMULATED speech: formant-like tones for each word, which every stratum distorts in its own way.

Nothing in it is measured. A word is two vowels of five, so that there are 25 words; a clip has
two. A speaker has a pitch, a length of the vocal tract and a tempo. Strata differ in
two ways, both known:

* a voice that can be heard: breathy, muffled (high formants damped), tremor (amplitude and pitch
  waver) and strained (a flat spectrum, a high pitch), each with a hiss at frequencies of its own;
* a substitution: in stratum number s (from 1) vowel v is spoken as vowel v + s (modulo 5). The same
  sound means another word in each stratum, as where speech sounds are consistently replaced by
  others.

Typical speakers have a plain voice and replace nothing.
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

# First and second formant in Hz (Peterson & Barney 1952, table II, men: i, e, a, o, u).
VOWELS = {"i": (270, 2290), "e": (530, 1840), "a": (730, 1090), "o": (570, 840), "u": (300, 870)}
THIRD = 2500.0
STRATA = ("breathy", "muffled", "tremor", "strained")
TYPICAL = "typical"
# Where the noise of a voice lies, in Hz, and how loud it is at each frequency.
NOISE = {
    "breathy": (0, 8000, 1.0),
    "muffled": (0, 300, 2.0),
    "tremor": (600, 1500, 1.0),
    "strained": (2500, 8000, 1.0),
    "typical": (0, 8000, 0.0),
}
CONSONANTS = ("b", "d", "g", "k", "l")
# The most harmonics, and the frequency above which there are none.
HARMONICS, HIGHEST = 40, 4000.0


@dataclass(frozen=True)
class Synthesiser:
    """Clips by number, all of `length` seconds: the vowels of the words that are heard in each, its
    speaker, and the voice that this one has (a name of `STRATA`, or plain).
    """

    words: list[list[tuple[int, int]]]
    speakers: list["Speaker"]
    voices: list[str]
    seed: int
    length: float

    def key(self, row: int) -> str:
        """Everything that a clip follows from, the code that speaks it among that."""
        about = (self.words[row], self.speakers[row], self.voices[row], self.length, self.seed, row)
        return f"{_source()}/{about}"

    def wave(self, row: int, rate: int, start: float, stop: float) -> Wave:
        """Samples (n,) at `rate` Hz."""
        random = np.random.default_rng([self.seed, 7, row])
        wave = synthesise(
            self.words[row], self.speakers[row], self.voices[row], self.length, rate, random
        )
        return wave[round(start * rate) : round(stop * rate)]

    def seconds(self, row: int) -> float:
        """How long a clip is: all are as long, words begin anywhere in them."""
        return self.length


@cache
def _source() -> str:
    """Hash of this module and of all that it imports."""
    return source_hash(__name__)


@dataclass(frozen=True)
class Speaker:
    """A speaker: pitch in Hz, factor of all formants, and of all durations; how loud the hiss of
    the voice is.
    """

    pitch: float
    tract: float
    tempo: float
    hiss: float = 0.0


def speaker_at(random: np.random.Generator, hiss: float) -> Speaker:
    """A speaker at random."""
    pitch, tract, tempo = random.uniform((95.0, 0.92, 0.9), (210.0, 1.08, 1.1)).tolist()
    return Speaker(round(pitch, 2), round(tract, 4), round(tempo, 3), hiss)


# Seconds of a vowel, between words, and before and after a clip.
VOWEL, GAP, EDGE = 0.11, 0.06, 0.04


def shortest(words: int, tempo: float) -> float:
    """Seconds that a clip has to have."""
    return 2 * EDGE + tempo * (words * 2 * VOWEL + (words - 1) * GAP)


def synthesise(
    words: list[tuple[int, int]],
    speaker: Speaker,
    voice: str,
    length: float,
    rate: int,
    random: np.random.Generator,
) -> Wave:
    """Words in a clip of `length` seconds: harmonics of a pitch, as strong as formants let them."""
    count = round(length * rate)
    times = np.arange(count) / rate
    steps = np.arange(0.0, times[-1] + 1.0 / RATE, 1.0 / RATE)
    start = EDGE + random.random() * max(length - shortest(len(words), speaker.tempo), 0.0)
    loud, formants = _course(words, speaker, start, steps)
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
    wave += speaker.hiss * loudness * band_pass(noise, lowest, highest, rate)
    found: Wave = (0.3 * wave / max(float(np.abs(wave).max()), 1e-9)).astype(np.float32)
    return found


def low_pass(wave: NDArray[Any], hertz: float, rate: int) -> NDArray[Any]:
    """What passes a filter of one pole."""
    decay = np.exp(-2 * np.pi * hertz / rate)
    found: NDArray[Any] = lfilter([1 - decay], [1, -decay], wave)
    return found


def band_pass(wave: NDArray[Any], lowest: float, highest: float, rate: int) -> NDArray[Any]:
    """The frequencies of a wave from `lowest` to `highest` Hz."""
    spectrum = np.fft.rfft(wave)
    hertz = np.fft.rfftfreq(len(wave), 1 / rate)
    spectrum[(hertz < lowest) | (hertz > highest)] = 0
    return np.fft.irfft(spectrum, len(wave))


def _course(
    words: list[tuple[int, int]], speaker: Speaker, start: float, steps: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Loudness (s,) and formants (s, 3) in Hz, at times `steps` (s,)."""
    targets = np.array(list(VOWELS.values()), float)
    vowel, gap = VOWEL * speaker.tempo, GAP * speaker.tempo
    at, hertz, borders = start, [], []
    for first, second in words:
        for number, kind in enumerate((first, second)):
            middle = at + (number + 0.5) * vowel
            hertz.append((middle, *targets[kind], THIRD))
        borders.append((at, at + 2 * vowel))
        at += 2 * vowel + gap
    known = np.array(hertz)
    formants = np.stack([np.interp(steps, known[:, 0], known[:, n]) for n in (1, 2, 3)], axis=1)
    loud = np.zeros_like(steps)
    for first_, last in borders:
        rise = np.clip(np.minimum(steps - first_, last - steps) / 0.02, 0, 1)
        loud = np.maximum(loud, np.sin(0.5 * np.pi * rise))
    return loud, formants * speaker.tract


def _harmonics(
    pitch: NDArray[Any],
    loud: NDArray[Any],
    formants: NDArray[Any],
    steps: NDArray[Any],
    times: NDArray[Any],
    tilt: float,
) -> NDArray[np.float64]:
    """The sum of the harmonics of a pitch (s,), each as strong as three resonances let it be. The
    source falls with the power `tilt` of a harmonic's number.
    """
    widths = np.array([80.0, 110.0, 160.0])
    every = round(1.0 / (RATE * (times[1] - times[0])))
    between = np.arange(every) / every

    def at_times(values: NDArray[Any]) -> NDArray[Any]:
        """Values (s,) of the steps, interpolated linearly to the times."""
        ahead = np.append(values[1:], values[-1])
        found: NDArray[Any] = values[:, None] + (ahead - values)[:, None] * between
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
    typical_speakers: int = 30,
    typical_clips: int = 40,
    words_each: int = 2,
    voice: float = 0.25,
    substitution: bool = True,
    seed: int = 0,
    bands: int = 40,
    seconds: float = 0.64,
    vocabulary: int = 64,
    fraction: float = 1.0,
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
    split_seed: int = 0,
) -> Speech:
    """Simulated speech: `clips` of each of `speakers` of each of `strata`, and typical speech.

    Typical speech is in the splits `typical` and `typical_val` (a fifth of its speakers); of the
    strata whole speakers are held out. Clips have `words_each` words. `voice` is how loud the noise
    of the strata's voices is, of an amplitude of about one; without `substitution` strata differ by
    their voices alone. The rest is as in `Speech`.
    """
    if not 1 <= strata <= len(STRATA):
        raise UserError(f"data.strata={strata} must be 1 to {len(STRATA)}")
    random = np.random.default_rng([seed, 5])
    rows: list[dict[str, Any]] = []
    words: list[list[tuple[int, int]]] = []
    sounds: list[list[tuple[int, int]]] = []
    people: list[Speaker] = []
    voices: list[str] = []
    for stratum in (*STRATA[:strata], TYPICAL):
        many, each = (typical_speakers, typical_clips) if stratum == TYPICAL else (speakers, clips)
        for number in range(many):
            own, typical = (
                speaker_at(
                    random, round(voice * (random.random() if stratum == TYPICAL else 1.0), 3)
                ),
                TYPICAL_SPLITS[number % 5 == 4],
            )
            shift = STRATA.index(stratum) + 1 if substitution and stratum != TYPICAL else 0
            for _ in range(each):
                said = random.integers(len(VOWELS), size=(words_each, 2))
                words.append([(int(a), int(b)) for a, b in said])
                sounds.append([(int(a), int(b)) for a, b in (said + shift) % len(VOWELS)])
                people.append(own)
                voices.append(stratum)
                place = {"speaker": f"{stratum} {number}", "stratum": stratum}
                rows.append({"transcript": text(words[-1]), "split": typical, **place})
    table = pd.DataFrame(rows)
    chosen = np.flatnonzero(table["stratum"] != TYPICAL)
    speaker, stratum = (
        table[name].iloc[chosen].astype("category").cat.codes.to_numpy(np.int64)
        for name in ("speaker", "stratum")
    )
    parts = dict(zip(SPLITS, fractions, strict=True))
    dealt = by_speaker(speaker, stratum, parts, split_seed, sorted(STRATA[:strata]))
    for name, members in dealt.items():
        table.loc[chosen[members], "split"] = name
    if seconds < shortest(words_each, 1.1):
        raise UserError(
            f"data.seconds={seconds} is too short for data.words_each={words_each}; set it to "
            f"{shortest(words_each, 1.1):.2f} or more"
        )
    source = Synthesiser(sounds, people, voices, seed, seconds)
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
