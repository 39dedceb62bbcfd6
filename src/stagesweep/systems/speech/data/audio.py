"""Reads audio files of any sampling rate, and detects files that cannot be used."""

import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import gcd
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

from stagesweep.base.files import atomic_text
from stagesweep.systems.speech.optional import optional_imports

Wave = NDArray[np.float32]
log = logging.getLogger(__name__)

# A clip is silent if its peak amplitude (of 1) is at most -80 dB, the noise of 14 bits.
SILENCE = 1e-4


@dataclass(frozen=True)
class AudioInfo:
    """Length and peak amplitude of an audio file, or the `fault` that makes it unusable.

    If the file's `size` or `mtime` (ns) changes, the file is read again.
    """

    size: int
    mtime: int
    seconds: float = 0.0
    peak: float = 0.0
    fault: str | None = None


def read(path: Path, rate: int, start: float = 0.0, stop: float | None = None) -> Wave:
    """Read samples (n,) of a file from `start` to `stop` seconds, mono, at `rate` Hz.

    Channels are averaged. Other rates are resampled by scipy's polyphase filter.
    """
    with optional_imports():
        import soundfile
    with soundfile.SoundFile(path) as file:
        own: int = file.samplerate
        file.seek(min(round(start * own), file.frames))
        count = -1 if stop is None else round(stop * own) - round(start * own)
        wave = file.read(count, dtype="float32", always_2d=True).mean(1)
    if own != rate:
        divisor = gcd(own, rate)
        wave = resample_poly(wave, rate // divisor, own // divisor)
    found: Wave = np.ascontiguousarray(wave, dtype=np.float32)
    return found


def inspect(path: Path) -> AudioInfo:
    """Read a whole file: its length and peak amplitude, or its fault."""
    with optional_imports():
        import soundfile
    try:
        stat = path.stat()
    except OSError:
        return AudioInfo(0, 0, fault="the file does not exist")
    try:
        seconds, peak = 0.0, 0.0
        with soundfile.SoundFile(path) as file:
            expected, count = file.frames, 0
            for block in file.blocks(1 << 20, dtype="float32"):
                count += len(block)
                peak = max(peak, float(np.abs(block).max(initial=0.0)))
            seconds = count / file.samplerate
        fault = None
        if count < expected:
            fault = f"the file is damaged: {count} of {expected} samples can be read"
        elif not np.isfinite(peak):
            fault = "the file has values that are not finite"
        elif not count:
            fault = "the file has no samples"
        elif peak <= SILENCE:
            fault = f"the clip is silent (peak amplitude {peak:.1g})"
    except (soundfile.SoundFileError, OSError) as error:
        reason = str(error).rpartition(": ")[2].rstrip(".")
        fault = f"not a readable audio file ({reason})"
    return AudioInfo(stat.st_size, stat.st_mtime_ns, seconds, peak, fault)


def inspect_all(paths: Sequence[Path], cache: Path, threads: int = 4) -> list[AudioInfo]:
    """Inspect every file; unchanged files come from the cache.

    `cache` is a JSON file, which is written atomically.
    """
    known = _read_cache(cache)
    stale = []
    for path in dict.fromkeys(paths):
        info = known.get(str(path))
        try:
            stat = path.stat()
        except OSError:
            known.pop(str(path), None)
            stale.append(path)
            continue
        if info is None or (info.size, info.mtime) != (stat.st_size, stat.st_mtime_ns):
            stale.append(path)
    if stale:
        if len(stale) > 1000:
            log.info("inspecting %d new or changed audio files", len(stale))
        with ThreadPoolExecutor(threads) as pool:
            found = dict(zip(map(str, stale), pool.map(inspect, stale), strict=True))
        known |= found
        cached = {path: asdict(info) for path, info in known.items() if info.size}
        atomic_text(cache, json.dumps(cached))
    return [known[str(path)] for path in paths]


def _read_cache(cache: Path) -> dict[str, AudioInfo]:
    try:
        return {path: AudioInfo(**info) for path, info in json.loads(cache.read_text()).items()}
    except (OSError, ValueError, TypeError):  # missing, or written by another version
        return {}
