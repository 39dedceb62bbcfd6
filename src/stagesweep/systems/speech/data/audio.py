"""Read audio files at any sampling rate, and find out which of them cannot be used."""

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
from stagesweep.systems.speech.extra import needed

Wave = NDArray[np.float32]
log = logging.getLogger(__name__)

# The largest amplitude (of 1) of a clip that counts as silence: -80 dB, the noise of 14 bits.
SILENCE = 1e-4


@dataclass(frozen=True)
class Sound:
    """What is known of an audio file: its length, its largest amplitude, or why it is unusable.

    `size` and `mtime` (ns) are the file's; when they change, it is looked at again.
    """

    size: int
    mtime: int
    seconds: float = 0.0
    peak: float = 0.0
    fault: str | None = None


def read(path: Path, rate: int, start: float = 0.0, stop: float | None = None) -> Wave:
    """Samples (n,) of a file from `start` to `stop` in seconds, mono, at `rate` Hz.

    Channels are averaged; other rates are resampled by scipy's polyphase filter.
    """
    with needed():
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


def look(path: Path) -> Sound:
    """Read a whole file once and say how long and how loud it is, or what is wrong with it."""
    with needed():
        import soundfile
    try:
        stat = path.stat()
    except OSError:
        return Sound(0, 0, fault="there is no such file")
    try:
        seconds, peak = 0.0, 0.0
        with soundfile.SoundFile(path) as file:
            promised, read_ = file.frames, 0
            for block in file.blocks(1 << 20, dtype="float32"):
                read_ += len(block)
                peak = max(peak, float(np.abs(block).max(initial=0.0)))
            seconds = read_ / file.samplerate
        fault = None
        if read_ < promised:
            fault = f"it is broken: {read_} of {promised} samples can be read"
        elif not np.isfinite(peak):
            fault = "it holds values that are no numbers"
        elif not read_:
            fault = "it holds no samples"
        elif peak <= SILENCE:
            fault = f"it is silent (largest amplitude {peak:.1g})"
    except (soundfile.SoundFileError, OSError) as error:
        fault = f"it is no readable audio file ({str(error).rpartition(': ')[2].rstrip('.')})"
    return Sound(stat.st_size, stat.st_mtime_ns, seconds, peak, fault)


def survey(paths: Sequence[Path], cache: Path, threads: int = 4) -> list[Sound]:
    """Look at every file, at those that have not changed since the last time by what was found.

    `cache` is the JSON file in which that is kept, written whole.
    """
    known = _known(cache)
    stale = []
    for path in dict.fromkeys(paths):
        sound = known.get(str(path))
        try:
            stat = path.stat()
        except OSError:
            known.pop(str(path), None)
            stale.append(path)
            continue
        if sound is None or (sound.size, sound.mtime) != (stat.st_size, stat.st_mtime_ns):
            stale.append(path)
    if stale:
        if len(stale) > 1000:
            log.info("looking at %d audio files for the first time", len(stale))
        with ThreadPoolExecutor(threads) as pool:
            found = dict(zip(map(str, stale), pool.map(look, stale), strict=True))
        known |= found
        lasting = {path: asdict(sound) for path, sound in known.items() if sound.size}
        atomic_text(cache, json.dumps(lasting))
    return [known[str(path)] for path in paths]


def _known(cache: Path) -> dict[str, Sound]:
    try:
        return {path: Sound(**sound) for path, sound in json.loads(cache.read_text()).items()}
    except (OSError, ValueError, TypeError):  # not there yet, or of another version
        return {}
