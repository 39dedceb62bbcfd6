"""Seeded splits that keep groups of samples together."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from stagesweep.base.errors import UserError

Codes = NDArray[np.int64]


def connected_groups(keys: Sequence[Codes], rows: int) -> Codes:
    """Number the connected components (rows,) of samples that share a value of any key.

    Each key holds codes (rows,); a code below 0 means none and connects to no other sample. Two
    values of one key that share a value of another key are thus in one component.
    """
    nodes, edges = rows, [np.empty((0, 2), dtype=np.int64)]
    for key in keys:
        known = np.flatnonzero(key >= 0)
        edges.append(np.stack([known, nodes + key[known]], axis=1))
        nodes += int(key.max(initial=-1)) + 1
    sources, targets = np.concatenate(edges).T
    graph = coo_matrix((np.ones(len(sources)), (sources, targets)), shape=(nodes, nodes))
    components = connected_components(graph, directed=False)[1][:rows]
    return np.unique(components, return_inverse=True)[1]


def split_groups(groups: Codes, fractions: Mapping[str, float], seed: int) -> dict[str, Codes]:
    """Assign whole groups to named splits of about the given fractions; rows keep their order.

    `groups` is (n,), numbered from 0. The groups are put in random order, end to end, and each
    goes to the split that contains its midpoint. Raises UserError when a split is empty.
    """
    _check(fractions)
    sizes = np.bincount(groups)
    order = np.random.default_rng(seed).permutation(len(sizes))
    ends = sizes[order].cumsum()
    middles = np.empty(len(sizes))
    middles[order] = (ends - sizes[order] / 2) / len(groups)
    bounds = np.cumsum(list(fractions.values()))[:-1]
    side = np.searchsorted(bounds, middles, side="right")[groups]
    splits = {name: np.flatnonzero(side == number) for number, name in enumerate(fractions)}
    for name, members in splits.items():
        if not len(members):
            raise UserError(
                f"the {name} split is empty: {len(groups)} rows in {len(sizes)} groups cannot be "
                f"split into {dict(fractions)}; change data.fractions or data.split_seed"
            )
    return splits


def split_strata(strata: Codes, fractions: Mapping[str, float], seed: int) -> dict[str, Codes]:
    """Split the rows of each stratum by about the given fractions; rows keep their order.

    `strata` is (n,); codes below 0 are a stratum of their own. The first split has a row of every
    stratum. Raises UserError when a split is empty.
    """
    _check(fractions)
    order = np.random.default_rng(seed).permutation(len(strata))
    order = order[np.argsort(strata[order], kind="stable")]
    sizes = np.unique(strata, return_counts=True)[1]
    # The position of each row within its stratum, in 0..1.
    position = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    bounds = np.cumsum(list(fractions.values()))[:-1]
    side = np.empty(len(strata), np.int64)
    side[order] = np.searchsorted(bounds, position, side="right")
    splits = {name: np.flatnonzero(side == number) for number, name in enumerate(fractions)}
    for name, members in splits.items():
        if not len(members):
            raise UserError(f"the {name} split is empty: {len(strata)} rows are too few to split")
    return splits


def _check(fractions: Mapping[str, float]) -> None:
    if min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise UserError(f"data.fractions must be positive and add up to 1, got {dict(fractions)}")
