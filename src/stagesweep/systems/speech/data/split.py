"""Splits of clips by speaker, stratified by stratum; stratified subsets."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from stagesweep.base.errors import UserError

Codes = NDArray[np.int64]
SPLITS = ("train", "val", "test")
# Optional splits of a table: typical speech, to pretrain a model.
TYPICAL = ("typical", "typical_val")


def by_speaker(
    speaker: Codes,
    stratum: Codes,
    fractions: Mapping[str, float],
    seed: int,
    names: Sequence[str],
    allow_single: bool = False,
) -> dict[str, Codes]:
    """Assign whole speakers of each stratum to splits of about the given fractions of clips.

    `speaker` and `stratum` are codes (n,); `names` are the names of the strata. The first and the
    last split have a speaker of every stratum; a stratum of two speakers has none in between.
    Raises UserError for an empty split, and for a stratum with one speaker unless `allow_single`,
    which assigns that speaker to train.
    """
    split = np.full(len(speaker), -1, np.int64)
    for code in np.unique(stratum):
        rows = np.flatnonzero(stratum == code)
        own, sizes = np.unique(speaker[rows], return_counts=True)
        if len(own) == 1 and not allow_single:
            raise UserError(
                f"stratum {names[code]!r} has one speaker, who cannot be in both train "
                f"and test; leave the stratum out ('data.drop=[\"{names[code]}\"]'), or set "
                "data.split_by=clip to split clips, not speakers"
            )
        order = np.random.default_rng([seed, int(code)]).permutation(len(own))
        for name, part in zip(own[order], _assign(sizes[order], fractions), strict=True):
            split[rows[speaker[rows] == name]] = part
    return _rows_by_split(split, fractions, "data.fractions or data.split_seed")


def by_clip(stratum: Codes, fractions: Mapping[str, float], seed: int) -> dict[str, Codes]:
    """Assign the clips of each stratum to splits of about the given fractions."""
    split = np.zeros(len(stratum), np.int64)
    bounds = np.cumsum(list(fractions.values()))[:-1]
    for code in np.unique(stratum):
        rows = np.flatnonzero(stratum == code)
        order = np.random.default_rng([seed, int(code)]).permutation(len(rows))
        place = (np.arange(len(rows)) + 0.5) / len(rows)
        split[rows[order]] = np.searchsorted(bounds, place, side="right")
    return _rows_by_split(split, fractions, "data.fractions")


def by_column(values: Sequence[str], line: Sequence[int], source: str) -> dict[str, Codes]:
    """Return the rows of each split that a column names; raises UserError for another name."""
    known = (*SPLITS, *TYPICAL)
    for row, value in enumerate(values):
        if value not in known:
            raise UserError(
                f"{value!r} in the split column, line {line[row]} of {source}, is not a split; "
                f"there are {', '.join(known)} (data.columns.split=null splits by speaker)"
            )
    split = np.array([known.index(value) for value in values], np.int64)
    names = [name for name in known if name in SPLITS or name in values]
    return _rows_by_split(split, dict.fromkeys(names, 0.0), f"the split column of {source}")


def check_disjoint(
    rows: Mapping[str, Codes], speaker: Codes, names: Sequence[str], source: str
) -> None:
    """Raise UserError if a speaker is in two splits."""
    seen: dict[int, str] = {}
    for split, members in rows.items():
        for code in np.unique(speaker[members]):
            if code in seen:
                raise UserError(
                    f"{source}: speaker {names[code]!r} is in the splits {seen[code]} and {split}, "
                    "so evaluation is not on unseen speakers; correct the split column, or set "
                    "data.shared_speakers=true to allow this"
                )
            seen[code] = split


def stratified(stratum: Codes, samples: float | int | None, seed: int) -> Codes:
    """Select rows with an equal share of each stratum, in order. Subsets with the same seed are
    nested.

    `samples` is their number, or a share below 1; None or 1.0 takes all. Each stratum has at least
    one row if there are as many samples as strata.
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
        # The first row of a stratum precedes the second row of any that is not twice as large.
        place[rows[order]] = np.arange(len(rows)) / len(rows)
    # Ties (the first row of each stratum) are in file order.
    return np.sort(np.argsort(place, kind="stable")[:count])


def _assign(sizes: Codes, fractions: Mapping[str, float]) -> Codes:
    """Return the split of each speaker in order, by the position of the middle of their clips. The
    first speaker is in train, the last of two or more in test, and one of three or more in val.
    """
    ends = sizes.cumsum()
    bounds = np.cumsum(list(fractions.values()))[:-1]
    found: Codes = np.searchsorted(bounds, (ends - sizes / 2) / ends[-1], side="right")
    found[-1], found[0] = len(fractions) - 1, 0
    if len(found) > 2 and 1 not in found:
        found[-2] = 1
    return found


def _rows_by_split(split: Codes, fractions: Mapping[str, float], remedy: str) -> dict[str, Codes]:
    rows = {name: np.flatnonzero(split == number) for number, name in enumerate(fractions)}
    for name, members in rows.items():
        if not len(members):
            raise UserError(f"the {name} split has no clips; change {remedy}")
    return rows
