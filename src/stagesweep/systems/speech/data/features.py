"""Log-mel features of clips: computed once, kept on disk, and read from there.

A clip's features are stored without the frames that pad it: for each clip a file of its own, named
by a hash of everything that they follow from, with a checksum. Two processes may fill one cache at
the same time, and one that is killed leaves nothing that is taken for whole.
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
from stagesweep.systems.speech.extra import needed

Frames = NDArray[np.float16]
log = logging.getLogger(__name__)

# Frames of features in a second: Whisper's hop of 10 ms.
RATE = 100


def folder() -> Path:
    """The folder of features that are kept: STAGESWEEP_FEATURES, or else beside the store."""
    given = os.environ.get("STAGESWEEP_FEATURES")
    return Path(given).expanduser() if given else Store.default().root.parent / "features"


@dataclass(frozen=True)
class LogMel:
    """Whisper's log-mel features (Radford et al. 2022, section 2.2) by transformers' extractor.

    `bands` mel bands of audio at `rate` Hz, `frames` of 10 ms in a window.
    """

    bands: int = 80
    rate: int = 16000
    frames: int = 3000

    @cached_property
    def extractor(self) -> Any:
        """The feature extractor, made when the first clip is computed."""
        with needed():
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
                "data.bands=%d are more than audio of %d Hz can tell apart: some stay empty",
                self.bands,
                self.rate,
            )
        return found

    def of(self, wave: audio.Wave) -> Frames:
        """Features (frames, bands) of samples (n,), one row for each 10 ms of them and one more,
        which is what silence after the clip looks like.
        """
        hop = self.rate // RATE
        most = self.frames * hop
        found = self.extractor(
            wave[:most], sampling_rate=self.rate, max_length=most, return_tensors="np"
        )["input_features"][0]
        # A frame sees 12.5 ms on each side: two frames after the end nothing of the clip is left.
        count = min(-(-len(wave) // hop) + 2, self.frames)
        frames: Frames = found.T[: count + 1].astype(np.float16)
        return frames

    def about(self) -> str:
        """What features follow from, beside the clip."""
        return f"{self.bands}/{self.rate}/{self.frames}/{_source()}"


class Clips(Protocol):
    """Where clips come from."""

    def key(self, row: int) -> str:
        """What identifies the audio of a clip: different when it has changed."""
        ...

    def seconds(self, row: int) -> float:
        """How long a clip is."""
        ...

    def wave(self, row: int, rate: int, start: float, stop: float) -> audio.Wave:
        """Samples (n,) of a clip from `start` to `stop` seconds at `rate` Hz."""
        ...


@dataclass(frozen=True)
class Files:
    """Clips in audio files, with what a survey has found of each."""

    paths: list[Path]
    sounds: list[audio.Sound]

    def key(self, row: int) -> str:
        """Path, size and time of last change."""
        sound = self.sounds[row]
        return f"{self.paths[row].absolute()}/{sound.size}/{sound.mtime}"

    def seconds(self, row: int) -> float:
        """How long the file is."""
        return self.sounds[row].seconds

    def wave(self, row: int, rate: int, start: float, stop: float) -> audio.Wave:
        """Read a part of the file; raises UserError naming it when that fails by now."""
        try:
            return audio.read(self.paths[row], rate, start, stop)
        except Exception as error:
            raise UserError(
                f"{self.paths[row]} cannot be read any more: {error}; run the same command again"
            ) from error


@dataclass(frozen=True)
class Heard:
    """Features of clips, from the cache or else computed and put there."""

    clips: Clips
    mel: LogMel
    cache: Path

    def key(self, row: int, start: float, stop: float) -> str:
        """Hash of everything that the features of a part of a clip follow from."""
        text = f"{self.clips.key(row)}/{start:.4f}/{stop:.4f}/{self.mel.about()}"
        return hashlib.sha256(text.encode()).hexdigest()[:40]

    def features(self, row: int, start: float, stop: float) -> Frames:
        """Features (frames, bands) of a clip from `start` to `stop` seconds."""
        key = self.key(row, start, stop)
        path = self.cache / key[:2] / key[2:]
        if (found := _read(path)) is not None:
            return found
        frames = self.mel.of(self.clips.wave(row, self.mel.rate, start, stop))
        _write(path, frames)
        return frames


@dataclass(frozen=True)
class Cepstra:
    """Features that are given instead of audio: all frames (n, bands), clip after clip, of which
    clip `i` has rows ``offsets[i]`` to ``offsets[i + 1]`` (100 a second).

    Each clip is scaled to mean 0 and variance 1 in every band (cepstral mean and variance
    normalisation; Viikki & Laurila 1998).
    """

    frames: NDArray[np.floating]
    offsets: NDArray[np.int64]
    rows: NDArray[np.int64]

    def key(self, row: int, start: float, stop: float) -> str:
        """Hash of the frames themselves."""
        values = np.ascontiguousarray(self._own(row, start, stop))
        return hashlib.sha256(values.tobytes()).hexdigest()[:40]

    def features(self, row: int, start: float, stop: float) -> Frames:
        """Features (frames, bands) of a clip from `start` to `stop` seconds, and a row of zeros."""
        own = self._own(row, start, stop).astype(np.float32)
        scaled = (own - own.mean(0)) / (own.std(0) + 1e-6)
        return np.concatenate([scaled, np.zeros_like(scaled[:1])]).astype(np.float16)

    def _own(self, row: int, start: float, stop: float) -> NDArray[np.floating]:
        first, last = self.offsets[self.rows[row]], self.offsets[self.rows[row] + 1]
        return self.frames[first + round(start * RATE) : min(first + round(stop * RATE), last)]


def check_cepstra(frames: NDArray[Any], offsets: NDArray[Any], path: str) -> NDArray[np.int64]:
    """The offsets as integers; UserError unless both arrays are as `Cepstra` takes them."""
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
    """Features (bands, length) as a model takes them; the last of `frames` pads the rest."""
    own = frames[:length].T.astype(np.float32)
    rest = np.repeat(frames[-1:].T.astype(np.float32), length - own.shape[1], axis=1)
    return np.concatenate([own, rest], axis=1)


@cache
def _source() -> str:
    """Hash of the code that computes features, so that what another version computed is not met."""
    return source_hash("stagesweep.systems.speech.data.features")


def _read(path: Path) -> Frames | None:
    """What the cache has; None when it is not there or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    body = content[12:]
    if len(content) >= 12:
        checksum, *shape = np.frombuffer(content[:12], np.uint32).tolist()
        if zlib.crc32(body) == checksum and len(body) == 2 * shape[0] * shape[1]:
            return np.frombuffer(body, np.float16).reshape(shape)
    log.warning("%s is damaged and is computed again", path)
    return None


def _write(path: Path, frames: Frames) -> None:
    """Give a file its name when it is whole. It is not synced: a checksum tells if it was lost."""
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
