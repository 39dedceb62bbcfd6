"""Splits of clips by speaker, with a share of every stratum in each; stratified subsets."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from stagesweep.base.errors import UserError

Codes = NDArray[np.int64]
SPLITS = ("train", "val", "test")
# Splits that a table may have besides: typical speech, from which a model is pretrained.
TYPICAL = ("typical", "typical_val")


def by_speaker(
    speaker: Codes,
    stratum: Codes,
    fractions: Mapping[str, float],
    seed: int,
    names: Sequence[str],
    allow_single: bool = False,
) -> dict[str, Codes]:
    """Deal whole speakers of each stratum into splits of about the given fractions of clips.

    `speaker` and `stratum` are codes (n,); `names` those of strata. Train has a speaker of every
    stratum, the last split too; a stratum of two speakers has none in between. Raises UserError
    for a stratum with one speaker, unless `allow_single` leaves it in train alone, and for a split
    that stays empty.
    """
    side = np.full(len(speaker), -1, np.int64)
    for code in np.unique(stratum):
        rows = np.flatnonzero(stratum == code)
        own, sizes = np.unique(speaker[rows], return_counts=True)
        if len(own) == 1 and not allow_single:
            raise UserError(
                f"stratum {names[code]!r} has one speaker, who cannot be both learnt from and "
                f"tested; leave it out ('data.drop=[\"{names[code]}\"]'), or set "
                "data.split_by=clip to split clips, not speakers"
            )
        order = np.random.default_rng([seed, int(code)]).permutation(len(own))
        for speaker_, split in zip(own[order], _dealt(sizes[order], fractions), strict=True):
            side[rows[speaker[rows] == speaker_]] = split
    return _rows(side, fractions, "data.fractions or data.split_seed")


def by_clip(stratum: Codes, fractions: Mapping[str, float], seed: int) -> dict[str, Codes]:
    """Deal the clips of each stratum into splits of about the given fractions."""
    side = np.zeros(len(stratum), np.int64)
    bounds = np.cumsum(list(fractions.values()))[:-1]
    for code in np.unique(stratum):
        rows = np.flatnonzero(stratum == code)
        order = np.random.default_rng([seed, int(code)]).permutation(len(rows))
        place = (np.arange(len(rows)) + 0.5) / len(rows)
        side[rows[order]] = np.searchsorted(bounds, place, side="right")
    return _rows(side, fractions, "data.fractions")


def by_column(values: Sequence[str], line: Sequence[int], source: str) -> dict[str, Codes]:
    """The rows of each split that a column names; raises UserError for any other name."""
    known = (*SPLITS, *TYPICAL)
    for row, value in enumerate(values):
        if value not in known:
            raise UserError(
                f"{value!r} in the split column, line {line[row]} of {source}, is no split; there "
                f"are {', '.join(known)} (data.columns.split=null splits by speaker)"
            )
    side = np.array([known.index(value) for value in values], np.int64)
    names = [name for name in known if name in SPLITS or name in values]
    return _rows(side, dict.fromkeys(names, 0.0), f"the split column of {source}")


def apart(rows: Mapping[str, Codes], speaker: Codes, names: Sequence[str], source: str) -> None:
    """Raise UserError for a speaker in two splits."""
    seen: dict[int, str] = {}
    for split, members in rows.items():
        for code in np.unique(speaker[members]):
            if code in seen:
                raise UserError(
                    f"{source}: speaker {names[code]!r} is in the splits {seen[code]} and {split}, "
                    "so that what is tested was learnt from; correct the split column, or set "
                    "data.shared_speakers=true to measure it so all the same"
                )
            seen[code] = split


def stratified(stratum: Codes, samples: float | int | None, seed: int) -> Codes:
    """A subset of rows with an equal share of each stratum, in order; of a larger number of samples
    it is a superset for the same seed.

    `samples` is their number, or below 1 (or 1.0) a share of all; None takes all. Of each stratum
    that there is at least one row is taken, as long as there are as many samples as strata.
    """
    n = len(stratum)
    if samples is None or (isinstance(samples, float) and samples == 1.0):
        return np.arange(n)
    count = round(samples * n) if isinstance(samples, float) and samples < 1 else int(samples)
    if count < 1:
        raise UserError(f"samples={samples} of {n} leaves none; give a larger number or share")
    place = np.empty(n)
    for code in np.unique(stratum):
        rows = np.flatnonzero(stratum == code)
        order = np.random.default_rng([seed, int(code) + 1]).permutation(len(rows))
        # The first of each stratum comes before the second of any that is not twice as large.
        place[rows[order]] = np.arange(len(rows)) / len(rows)
    # Ties (the first of each) in the order of the file.
    return np.sort(np.argsort(place, kind="stable")[:count])


def _dealt(sizes: Codes, fractions: Mapping[str, float]) -> Codes:
    """The split of each speaker in order, by where the middle of their clips falls; but the first
    is in train, of two or more the last in test, and of three or more one in val.
    """
    ends = sizes.cumsum()
    bounds = np.cumsum(list(fractions.values()))[:-1]
    found: Codes = np.searchsorted(bounds, (ends - sizes / 2) / ends[-1], side="right")
    found[-1], found[0] = len(fractions) - 1, 0
    if len(found) > 2 and 1 not in found:
        found[-2] = 1
    return found


def _rows(side: Codes, fractions: Mapping[str, float], remedy: str) -> dict[str, Codes]:
    rows = {name: np.flatnonzero(side == number) for number, name in enumerate(fractions)}
    for name, members in rows.items():
        if not len(members):
            raise UserError(f"the {name} split has no clips; change {remedy}")
    return rows
