import pytest
import torch

from stagesweep.base.view import View
from stagesweep.parallel.local_batches import local_batches, local_rows
from stagesweep.parallel.process_group import SINGLE_PROCESS, ProcessGroup

GROUPS = [ProcessGroup(rank, 3) for rank in range(3)]


def view(n: int) -> View:
    return View({"x": torch.arange(n)})


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("n", [3, 7, 20])
def test_all_processes_together_read_each_sample_once(n: int, sharded: bool) -> None:
    counts, rows = set(), []
    for group in GROUPS:
        batches, sharing = local_batches(view(n), group, sharded)
        found = [batch["index"].tolist() for batch in batches(2)]
        assert sharing is group
        assert all(found)
        counts.add(len(found))
        rows += [row for each in found for row in each]
    assert rows == list(range(n))
    assert len(counts) == 1 or not sharded


def test_a_split_smaller_than_the_group_is_read_by_all() -> None:
    batches, sharing = local_batches(view(2), GROUPS[1])
    assert sharing is SINGLE_PROCESS
    assert [batch["index"].tolist() for batch in batches(8)] == [[0, 1]]


def test_rows_of_a_batch_are_divided_unless_there_are_too_few() -> None:
    order = [torch.arange(6), torch.arange(2)]
    found = [[rows.tolist() for rows in local_rows(order, group)] for group in GROUPS]
    assert found == [[[0, 1], [0, 1]], [[2, 3], [0, 1]], [[4, 5], [0, 1]]]
    assert local_rows(order, SINGLE_PROCESS) is order
