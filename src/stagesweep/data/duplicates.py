"""Names that should occur once: ids of samples, cells and genes."""

from collections import Counter
from collections.abc import Sequence

import pandas as pd

from stagesweep.base.errors import UserError


def check_duplicates(
    names: pd.Series, choice: str, source: str, key: str, remedies: Sequence[str]
) -> None:
    """Raise UserError for names that occur twice, if `choice` is refuse; missing ones do not count.

    The message names the first three, and `key` with the `remedies` that it can be set to.
    """
    if choice not in ("refuse", *remedies):
        raise UserError(f"{key}={choice!r} must be {' or '.join(('refuse', *remedies))}")
    known = names.dropna()
    twice = known[known.duplicated()].unique()
    if choice == "refuse" and len(twice):
        shown = ", ".join(repr(str(name)) for name in twice[:3])
        more = f" and {len(twice) - 3} more" if len(twice) > 3 else ""
        raise UserError(
            f"{shown}{more}: more than once in {source}; fix it, or set {key}="
            f"{' or '.join(remedies)}"
        )


def unique_names(names: Sequence[str]) -> list[str]:
    """Return the names, each repetition with the next free number: a, a-1, a-2."""
    taken, seen, last, found = set(names), set[str](), Counter[str](), []
    for name in names:
        new = name
        while name in seen and new in taken:
            last[name] += 1
            new = f"{name}-{last[name]}"
        seen.add(name)
        taken.add(new)
        found.append(new)
    return found
