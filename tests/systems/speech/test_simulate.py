"""Simulated speech is reproducible; strata have the stated distortions."""

import numpy as np
import pytest

from stagesweep.base.errors import UserError
from stagesweep.systems.speech.data.dataset import Speech
from stagesweep.systems.speech.simulate import (
    STRATA,
    Speaker,
    low_pass,
    simulated_speech,
    synthesise,
    text,
)

WHO = Speaker(120.0, 1.0, 1.0, 0.2)


def wave_of(words: list[tuple[int, int]], voice: str) -> np.ndarray:
    return synthesise(words, WHO, voice, 0.4, 16000, np.random.default_rng(0))


def test_the_same_seed_gives_the_same_clips(small: Speech) -> None:
    first, second = small.split("test"), small.split("test")
    (a,), (b,) = first.batches(99), second.batches(99)
    assert (a["mel"] == b["mel"]).all()
    assert (wave_of([(0, 1)], "breathy") == wave_of([(0, 1)], "breathy")).all()


def test_strata_are_split_by_speaker_and_typical_speech_has_its_own_splits(small: Speech) -> None:
    clips = small.clips
    assert set(clips["stratum"]) == {*STRATA, "typical"}
    assert set(clips.loc[clips["stratum"] == "typical", "split"]) == {"typical", "typical_val"}
    assert (clips.groupby("speaker")["split"].nunique() == 1).all()
    own = clips[clips["stratum"] != "typical"]
    assert (own.groupby("stratum")["split"].nunique() == 3).all()


def test_voices_and_vowels_have_their_spectra() -> None:
    waves = {voice: wave_of([(2, 2)], voice) for voice in (*STRATA, "typical")}
    power = {v: np.abs(np.fft.rfft(w)) ** 2 for v, w in waves.items()}
    hertz = np.fft.rfftfreq(len(waves["typical"]), 1 / 16000)

    def share(voice: str, least: float, most: float) -> float:
        chosen = (hertz >= least) & (hertz < most)
        return float(power[voice][chosen].sum() / power[voice].sum())

    assert share("typical", 5000, 8000) < 1e-3 < share("breathy", 5000, 8000)
    assert share("muffled", 1500, 4000) < 0.5 * share("typical", 1500, 4000)
    assert share("strained", 2500, 8000) > 3 * share("typical", 2500, 8000)
    # "a" has its first formant at 730 Hz, "i" at 270 Hz.
    i = np.abs(np.fft.rfft(wave_of([(0, 0)], "typical"))) ** 2
    assert share("typical", 600, 900) > 2 * float(i[(hertz >= 600) & (hertz < 900)].sum() / i.sum())


def test_words_are_pairs_of_vowels() -> None:
    assert text([(0, 1), (4, 4)]) == "be lu"
    wave = np.ones(1600)
    assert low_pass(wave, 200.0, 16000)[-1] == pytest.approx(1, abs=1e-3)
    with pytest.raises(UserError, match=r"data.seconds=0.2 is too short for data.words_each=2"):
        simulated_speech(speakers=3, clips=1, typical_speakers=5, seconds=0.2)
    with pytest.raises(UserError, match=r"data.strata=9 must be 1 to 4"):
        simulated_speech(strata=9)
