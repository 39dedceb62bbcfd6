"""Audio is resampled to one rate; unusable files are detected."""

from pathlib import Path

import numpy as np
import soundfile

from stagesweep.systems.speech.data import audio


def tone(rate: int, hertz: float, seconds: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


def test_a_tone_keeps_its_pitch_at_another_rate(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(44100, 441), 44100)
    wave = audio.read(tmp_path / "a.wav", 16000)
    assert wave.dtype == np.float32
    assert abs(len(wave) - 8000) <= 1
    np.testing.assert_allclose(wave[200:-200], tone(16000, 441)[200 : len(wave) - 200], atol=2e-3)


def test_channels_are_averaged_and_a_part_is_read(tmp_path: Path) -> None:
    both = np.stack([tone(8000, 100), 0 * tone(8000, 100)], axis=1)
    soundfile.write(tmp_path / "a.flac", both, 8000)
    wave = audio.read(tmp_path / "a.flac", 8000, 0.1, 0.3)
    np.testing.assert_allclose(wave, both[800:2400].mean(1), atol=1e-4)


def test_each_fault_of_a_file_is_named(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "good.wav", tone(8000, 100), 8000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(800), 8000)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 8000)
    (tmp_path / "text.wav").write_text("no audio")
    good = audio.inspect(tmp_path / "good.wav")
    assert good.fault is None
    assert (good.seconds, round(good.peak, 2)) == (0.5, 0.5)
    faults = {n: audio.inspect(tmp_path / f"{n}.wav").fault or "" for n in
              ("missing", "silent", "empty", "text")}  # fmt: skip
    assert faults["missing"] == "the file does not exist"
    assert faults["silent"] == "the clip is silent (peak amplitude 0)"
    assert faults["empty"] == "the file has no samples"
    assert faults["text"].startswith("not a readable audio file (")


def test_a_file_is_read_again_only_if_it_has_changed(tmp_path: Path) -> None:
    path, cache = tmp_path / "a.wav", tmp_path / "cache.json"
    soundfile.write(path, tone(8000, 100), 8000)
    (first,) = audio.inspect_all([path], cache)
    stored = cache.read_text()
    cache.write_text(stored.replace("0.5", "9.5"))  # the cache is used ...
    assert audio.inspect_all([path], cache)[0].seconds == 9.5
    soundfile.write(path, tone(8000, 100, 1.0), 8000)  # ... until the file changes
    assert audio.inspect_all([path], cache)[0].seconds == 1.0
    assert first.seconds == 0.5
    path.unlink()
    assert audio.inspect_all([path], cache)[0].fault == "the file does not exist"
    cache.write_text("{broken")
    assert audio.inspect_all([path], cache)[0].fault == "the file does not exist"
