"""Features equal those of transformers' extractor; they are computed once and cached."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from stagesweep.systems.speech.data import features
from stagesweep.systems.speech.data.features import CachedFeatures, Cepstra, LogMel, padded

MEL = LogMel(bands=20, rate=16000, frames=100)


class Noise:
    """Clips of noise, which count how often they are read."""

    reads = 0

    def key(self, row: int) -> str:
        return f"noise {row}"

    def seconds(self, row: int) -> float:
        return 0.5

    def wave(self, row: int, rate: int, start: float, stop: float) -> Any:
        self.reads += 1
        random = np.random.default_rng(row)
        return random.normal(0, 0.1, round((stop - start) * rate)).astype(np.float32)


@pytest.mark.parametrize("seconds", [0.137, 0.5, 1.0, 1.4])
def test_features_are_those_of_the_extractor(seconds: float) -> None:
    wave = Noise().wave(1, 16000, 0, seconds)
    extractor: Any = WhisperFeatureExtractor(feature_size=20, chunk_length=1)
    expected = extractor(wave, sampling_rate=16000, return_tensors="np")["input_features"][0]
    frames = MEL.features(wave)
    assert len(frames) == min(int(np.ceil(seconds * 100)) + 3, 100)
    np.testing.assert_allclose(padded(frames, 100), expected, atol=1e-3)


def test_features_are_computed_once(tmp_path: Path) -> None:
    clips = Noise()
    cached = CachedFeatures(clips, MEL, tmp_path)
    first = cached.features(3, 0.0, 0.5)
    again = cached.features(3, 0.0, 0.5)
    assert clips.reads == 1
    np.testing.assert_array_equal(first, again)
    cached.features(3, 0.0, 0.4)
    CachedFeatures(clips, LogMel(21, 16000, 100), tmp_path).features(3, 0.0, 0.5)
    assert clips.reads == 3
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-7], lambda c: c[:40] + b"x" + c[41:], lambda c: b"", lambda c: c[:5]]
)
def test_a_damaged_file_is_computed_again(tmp_path: Path, damage: Any) -> None:
    clips = Noise()
    cached = CachedFeatures(clips, MEL, tmp_path)
    first = cached.features(0, 0.0, 0.5)
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    file.write_bytes(damage(file.read_bytes()))
    np.testing.assert_array_equal(cached.features(0, 0.0, 0.5), first)
    assert clips.reads == 2
    assert features._read(file) is not None


def test_too_many_bands_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert LogMel(bands=40, rate=4000, frames=20).features(np.ones(400, np.float32)).shape[1] == 40
    (line,) = caplog.messages
    assert line.startswith("data.bands=40 are too many for audio of 4000 Hz")


def test_cepstra_are_scaled_clip_by_clip() -> None:
    random = np.random.default_rng(0)
    frames = random.normal(3, 2, (90, 13)).astype(np.float16)
    cepstra = Cepstra(frames, np.array([0, 40, 90]), np.array([1, 0]))
    own = cepstra.features(0, 0.0, 0.5)
    assert own.shape == (51, 13)
    np.testing.assert_allclose(own[:50].astype(float).mean(0), 0, atol=1e-2)
    np.testing.assert_allclose(own[:50].astype(float).std(0), 1, atol=1e-2)
    assert (own[50] == 0).all()
    assert cepstra.key(0, 0.0, 0.5) != cepstra.key(1, 0.0, 0.5)
