"""Splits keep connected samples together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from stagesweep.base.errors import UserError
from stagesweep.data.split import connected_groups, split_groups

FRACTIONS = {"train": 0.7, "val": 0.15, "test": 0.15}
codes = arrays(np.int64, 60, elements=st.integers(-1, 40))


@settings(max_examples=100, deadline=None)
@given(codes, codes, st.integers(0, 5))
def test_no_gene_and_no_litter_is_in_two_splits(gene, litter, seed):
    groups = connected_groups([gene, litter], 60)
    try:
        splits = split_groups(groups, FRACTIONS, seed)
    except UserError:
        assert np.bincount(groups).max() > 9
        return
    assert sorted(np.concatenate(list(splits.values()))) == list(range(60))
    for key in (gene, litter):
        seen = [set(key[rows][key[rows] >= 0]) for rows in splits.values()]
        assert sum(map(len, seen)) == len(set.union(*seen))


@settings(max_examples=50, deadline=None)
@given(codes, codes)
def test_groups_are_the_transitive_closure_of_shared_values(gene, litter):
    together = np.eye(60, dtype=bool)
    for key in (gene, litter):
        together |= (key[:, None] == key) & (key >= 0)
    for _ in range(6):
        together = (together.astype(int) @ together) > 0
    groups = connected_groups([gene, litter], 60)
    np.testing.assert_array_equal(together, groups[:, None] == groups)
    assert set(groups) == set(range(groups.max() + 1))


def test_a_control_is_connected_by_its_litter_alone():
    gene = np.array([0, 0, -1, -1, 1])
    litter = np.array([5, 6, 6, 7, -1])
    groups = connected_groups([gene, litter], 5)
    assert groups[0] == groups[1] == groups[2]
    assert len({groups[0], groups[3], groups[4]}) == 3


def test_without_keys_every_row_is_its_own_group():
    assert connected_groups([], 4).tolist() == [0, 1, 2, 3]
    splits = split_groups(connected_groups([], 1000), FRACTIONS, seed=0)
    assert [len(rows) for rows in splits.values()] == [700, 150, 150]
    assert all((np.diff(rows) > 0).all() for rows in splits.values())


def test_the_seed_determines_the_split():
    groups = np.arange(100) // 2
    first, again, other = (split_groups(groups, FRACTIONS, seed)["val"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(other)


def test_errors_name_the_cause():
    with pytest.raises(UserError, match="the train split is empty: 9 rows in 1 groups"):
        split_groups(np.zeros(9, dtype=np.int64), {"train": 0.5, "val": 0.5}, seed=0)
    for wrong in ({"train": 0.5, "val": 0.4}, {"train": 1.2, "val": -0.2}):
        with pytest.raises(UserError, match=r"data\.fractions must be positive and add up to 1"):
            split_groups(np.arange(9), wrong, seed=0)
