"""Speakers are assigned as a whole, splits are stratified, subsets are nested."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagesweep.base.errors import UserError
from stagesweep.systems.speech.data import split

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}


def corpus(speakers: list[int], clips: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Codes of speakers and strata; `speakers` of each stratum."""
    stratum = np.repeat(np.arange(len(speakers)), np.array(speakers) * clips)
    return np.repeat(np.arange(sum(speakers)), clips), stratum


@given(st.lists(st.integers(2, 12), min_size=1, max_size=4), st.integers(0, 99))
def test_splits_share_no_speaker_and_each_stratum_is_tested(speakers: list[int], seed: int) -> None:
    if max(speakers) < 3:
        speakers = [*speakers, 3]
    speaker, stratum = corpus(speakers)
    names = [str(n) for n in range(len(speakers))]
    rows = split.by_speaker(speaker, stratum, SHARES, seed, names)
    assert sorted(np.concatenate(list(rows.values()))) == list(range(len(speaker)))
    for own, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not set(speaker[rows[own]]) & set(speaker[rows[other]])
    for side in ("train", "test"):
        assert set(stratum[rows[side]]) == set(stratum)
    for kind, count in enumerate(speakers):
        assert (kind in stratum[rows["val"]]) == (count > 2)


def test_fractions_are_approximately_met() -> None:
    speaker, stratum = corpus([40, 40])
    rows = split.by_speaker(speaker, stratum, SHARES, 0, ["a", "b"])
    for kind in (0, 1):
        shares = [np.mean(np.isin(np.flatnonzero(stratum == kind), rows[s])) for s in SHARES]
        np.testing.assert_allclose(shares, [0.7, 0.15, 0.15], atol=0.03)


def test_a_stratum_with_one_speaker_is_an_error() -> None:
    speaker, stratum = corpus([4, 1])
    message = r"stratum 'als' has one speaker, who cannot be in both train and test.*split_by"
    with pytest.raises(UserError, match=message):
        split.by_speaker(speaker, stratum, SHARES, 0, ["stroke", "als"])


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 9))
def test_subsets_are_stratified_and_nested(few: int, many: int, seed: int) -> None:
    few, many = sorted((few, many))
    stratum = np.repeat([0, 1, 2], [30, 20, 10])
    small, large = (split.stratified(stratum, n, seed) for n in (few, many))
    assert len(small) == few
    assert set(small) <= set(large)
    shares = np.bincount(stratum[large], minlength=3)
    assert (np.abs(shares - many * np.array([30, 20, 10]) / 60) <= 1.5).all()


def test_a_subset_is_a_number_or_a_share() -> None:
    stratum = np.repeat([0, 1], 50)
    assert len(split.stratified(stratum, 0.1, 0)) == 10
    assert len(split.stratified(stratum, None, 0)) == len(split.stratified(stratum, 1.0, 0)) == 100
    with pytest.raises(UserError, match=r"samples=0.001 of 100 leaves none"):
        split.stratified(stratum, 0.001, 0)
