"""Properties of the pair sampler for any labels and batch size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagesweep.base.errors import UserError
from stagesweep.base.view import View
from stagesweep.data.sampler import PairSampler

label_lists = st.lists(st.integers(-1, 8), min_size=1, max_size=120)


def batches(labels, size, seed=0):
    view = View({"gene": torch.tensor(labels)})
    return [
        rows.tolist()
        for rows in PairSampler("gene")(view, size, torch.Generator().manual_seed(seed))
    ]


@settings(max_examples=200, deadline=None)
@given(label_lists, st.integers(2, 40), st.integers(0, 3))
def test_partners_meet_and_every_sample_is_drawn_once(labels, size, seed):
    epoch = batches(labels, size, seed)
    assert sorted(row for batch in epoch for row in batch) == list(range(len(labels)))
    sizes = [len(batch) for batch in epoch]
    assert len(epoch) == -(-len(labels) // size) or sum(sizes) <= 3 * len(sizes)
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 3
    assert max(sizes) <= size + 2
    for batch in epoch:
        genes = [labels[row] for row in batch]
        for gene in genes:
            if gene >= 0 and labels.count(gene) > 1:
                assert genes.count(gene) > 1


def test_the_generator_alone_decides():
    labels = [0, 0, 1, 1, 1, -1, 2] * 20
    state = torch.get_rng_state()
    assert batches(labels, 16, seed=3) == batches(labels, 16, seed=3)
    assert batches(labels, 16, seed=3) != batches(labels, 16, seed=4)
    assert torch.equal(state, torch.get_rng_state())


def test_pairs_are_drawn_anew():
    labels = [0] * 40
    partners = {tuple(sorted(batches(labels, 2, seed)[0])) for seed in range(20)}
    assert len(partners) > 15


def test_a_batch_holds_a_mix_of_genes_and_controls():
    labels = [row // 4 for row in range(400)] + [-1] * 400
    for batch in batches(labels, 100):
        assert sum(labels[row] < 0 for row in batch) == 50


def test_bad_input_is_named():
    view = View({"gene": torch.zeros(4, dtype=torch.int64)})
    with pytest.raises(UserError, match=r"sampler\.column=sex: the data has no such column"):
        PairSampler("sex")(view, 2, torch.Generator())
    with pytest.raises(UserError, match="batch_size=1 has no room for a pair"):
        PairSampler("gene")(view, 1, torch.Generator())
