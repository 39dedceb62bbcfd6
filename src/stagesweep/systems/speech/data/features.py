"""Log-mel features of clips, computed once and cached on disk.

The cache has one file for each part of a clip, without padding and with a checksum. Its name is a
hash of the audio and of all settings that determine the features. Several processes may fill one
cache at the same time; a killed process leaves no incomplete file.
"""

import hashlib
import logging
import os
import secrets
import warnings
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stagesweep.base.errors import UserError
from stagesweep.base.files import file_error
from stagesweep.store.fingerprint import source_hash
from stagesweep.store.store import Store
from stagesweep.systems.speech.data import audio
from stagesweep.systems.speech.optional import optional_imports

Frames = NDArray[np.float16]
log = logging.getLogger(__name__)

# Frames per second: Whisper's hop is 10 ms.
RATE = 100


def cache_folder() -> Path:
    """Folder of cached features: STAGESWEEP_FEATURES, by default beside the store."""
    given = os.environ.get("STAGESWEEP_FEATURES")
    return Path(given).expanduser() if given else Store.default().root.parent / "features"


@dataclass(frozen=True)
class LogMel:
    """Whisper's log-mel features (Radford et al. 2022, section 2.2), by transformers' extractor:
    `bands` mel bands of audio at `rate` Hz; a window has `frames` of 10 ms.
    """

    bands: int = 80
    rate: int = 16000
    frames: int = 3000

    @cached_property
    def extractor(self) -> Any:
        """The feature extractor, created on first use."""
        with optional_imports():
            from transformers.models.whisper.feature_extraction_whisper import (
                WhisperFeatureExtractor,
            )
        kind: Any = WhisperFeatureExtractor
        hop = self.rate // RATE
        with warnings.catch_warnings(record=True) as empty:
            warnings.simplefilter("always")
            found = kind(
                feature_size=self.bands, sampling_rate=self.rate, hop_length=hop, n_fft=5 * hop // 2
            )
        if empty:
            log.warning(
                "data.bands=%d are too many for audio of %d Hz: some bands are empty",
                self.bands,
                self.rate,
            )
        return found

    def features(self, wave: audio.Wave) -> Frames:
        """Compute features (frames, bands) of samples (n,): a row for each 10 ms, and a last row of
        silence, which pads the clip.
        """
        hop = self.rate // RATE
        longest = self.frames * hop
        found = self.extractor(
            wave[:longest], sampling_rate=self.rate, max_length=longest, return_tensors="np"
        )["input_features"][0]
        # A frame covers 12.5 ms on each side, so two frames after the end there is only silence.
        count = min(-(-len(wave) // hop) + 2, self.frames)
        frames: Frames = found.T[: count + 1].astype(np.float16)
        return frames

    def key(self) -> str:
        """Settings that determine the features."""
        return f"{self.bands}/{self.rate}/{self.frames}/{_source()}"


def log_mel(checkpoint: str | None, bands: int, rate: int, seconds: float) -> LogMel:
    """Features of the checkpoint; without one, from the settings."""
    if checkpoint is None:
        if bands < 1:
            raise UserError(f"data.bands={bands} must be at least 1")
        if rate < 1 or rate % RATE or round(seconds * RATE) % 2 or seconds <= 0:
            raise UserError(
                f"data.rate={rate} must be a multiple of {RATE} and data.seconds={seconds} of "
                "0.02, the length of two frames"
            )
        return LogMel(bands, rate, round(seconds * RATE))
    with optional_imports():
        from transformers import WhisperFeatureExtractor
    try:
        own = WhisperFeatureExtractor.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(
            f"data.pretrained={checkpoint} has no feature extractor ({line}); give a folder with "
            "the files of a Whisper checkpoint, or its name"
        ) from error
    return LogMel(own.feature_size, own.sampling_rate, own.nb_max_frames)


class ClipSource(Protocol):
    """Source of the audio of clips."""

    def key(self, row: int) -> str:
        """Identify the audio of a clip; the key changes with the audio."""
        ...

    def seconds(self, row: int) -> float:
        """Length of a clip in seconds."""
        ...

    def wave(self, row: int, rate: int, start: float, stop: float) -> audio.Wave:
        """Return samples (n,) of a clip from `start` to `stop` seconds at `rate` Hz."""
        ...


@dataclass(frozen=True)
class AudioFiles:
    """Clips in audio files, and the result of their inspection."""

    paths: list[Path]
    infos: list[audio.AudioInfo]

    def key(self, row: int) -> str:
        """Path, size and time of last change."""
        info = self.infos[row]
        return f"{self.paths[row].absolute()}/{info.size}/{info.mtime}"

    def seconds(self, row: int) -> float:
        """Length of the file in seconds."""
        return self.infos[row].seconds

    def wave(self, row: int, rate: int, start: float, stop: float) -> audio.Wave:
        """Read a part of the file; raises UserError if that fails."""
        try:
            return audio.read(self.paths[row], rate, start, stop)
        except Exception as error:
            raise UserError(
                f"{self.paths[row]} can no longer be read: {error}; run the command again"
            ) from error


@dataclass(frozen=True)
class ClipSubset:
    """Some clips of a source without files."""

    clips: ClipSource
    rows: NDArray[np.int64]

    def key(self, row: int) -> str:
        """Identify the audio of a clip."""
        return self.clips.key(int(self.rows[row]))

    def seconds(self, row: int) -> float:
        """Length of a clip in seconds."""
        return self.clips.seconds(int(self.rows[row]))

    def wave(self, row: int, rate: int, start: float, stop: float) -> audio.Wave:
        """Return samples (n,) of a part of a clip."""
        return self.clips.wave(int(self.rows[row]), rate, start, stop)


@dataclass(frozen=True)
class CachedFeatures:
    """Features of clips, read from the cache or computed and added to it."""

    clips: ClipSource
    mel: LogMel
    cache: Path

    def key(self, row: int, start: float, stop: float) -> str:
        """Hash of the audio of a part of a clip and of the settings of its features."""
        text = f"{self.clips.key(row)}/{start:.4f}/{stop:.4f}/{self.mel.key()}"
        return hashlib.sha256(text.encode()).hexdigest()[:40]

    def features(self, row: int, start: float, stop: float) -> Frames:
        """Return features (frames, bands) of a clip from `start` to `stop` seconds."""
        key = self.key(row, start, stop)
        path = self.cache / key[:2] / key[2:]
        if (found := _read(path)) is not None:
            return found
        frames = self.mel.features(self.clips.wave(row, self.mel.rate, start, stop))
        _write(path, frames)
        return frames


@dataclass(frozen=True)
class Cepstra:
    """Given features instead of audio: `frames` (n, bands) of all clips, 100 a second. Clip `i` has
    the rows ``offsets[i]`` to ``offsets[i + 1]``.

    Each band of a clip is scaled to mean 0 and variance 1 (cepstral mean and variance
    normalisation; Viikki & Laurila 1998).
    """

    frames: NDArray[np.floating]
    offsets: NDArray[np.int64]
    rows: NDArray[np.int64]

    def key(self, row: int, start: float, stop: float) -> str:
        """Hash of the frames."""
        values = np.ascontiguousarray(self._frames(row, start, stop))
        return hashlib.sha256(values.tobytes()).hexdigest()[:40]

    def features(self, row: int, start: float, stop: float) -> Frames:
        """Return features (frames, bands) from `start` to `stop` seconds, and a row of zeros."""
        own = self._frames(row, start, stop).astype(np.float32)
        scaled = (own - own.mean(0)) / (own.std(0) + 1e-6)
        return np.concatenate([scaled, np.zeros_like(scaled[:1])]).astype(np.float16)

    def _frames(self, row: int, start: float, stop: float) -> NDArray[np.floating]:
        first, last = self.offsets[self.rows[row]], self.offsets[self.rows[row] + 1]
        return self.frames[first + round(start * RATE) : min(first + round(stop * RATE), last)]


def check_cepstra(frames: NDArray[Any], offsets: NDArray[Any], path: str) -> NDArray[np.int64]:
    """Return the offsets as integers; UserError if an array is not valid for `Cepstra`."""
    if frames.ndim != 2 or frames.dtype.kind not in "fiu" or not np.isfinite(frames).all():
        raise UserError(
            f"data.features={path}: the features must be finite numbers (frames, bands)"
        )
    if (
        offsets.ndim != 1
        or offsets.dtype.kind not in "iu"
        or len(offsets) < 2
        or not 0 <= offsets[0] <= offsets[-1] <= len(frames)
        or (offsets[1:] < offsets[:-1]).any()
    ):
        raise UserError(
            f"data.features={path}: offsets must be integers that rise from 0 to {len(frames)}, "
            "the number of frames"
        )
    return offsets.astype(np.int64)


def padded(frames: Frames, length: int) -> NDArray[np.float32]:
    """Pad frames with the last of them; returns features (bands, length)."""
    own = frames[:length].T.astype(np.float32)
    rest = np.repeat(frames[-1:].T.astype(np.float32), length - own.shape[1], axis=1)
    return np.concatenate([own, rest], axis=1)


@cache
def _source() -> str:
    """Hash of the code that computes features: another version has other cache files."""
    return source_hash("stagesweep.systems.speech.data.features")


def _read(path: Path) -> Frames | None:
    """Read a file of the cache; None if it is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    body = content[12:]
    if len(content) >= 12:
        checksum, *shape = np.frombuffer(content[:12], np.uint32).tolist()
        if zlib.crc32(body) == checksum and len(body) == 2 * shape[0] * shape[1]:
            return np.frombuffer(body, np.float16).reshape(shape)
    log.warning("%s is damaged; its features are computed again", path)
    return None


def _write(path: Path, frames: Frames) -> None:
    """Write the file atomically, without sync: the checksum detects lost data."""
    body = np.ascontiguousarray(frames).tobytes()
    head = np.array([zlib.crc32(body), *frames.shape], np.uint32).tobytes()
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(head + body)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise file_error(error, path) from error
