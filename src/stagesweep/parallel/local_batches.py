"""The part of a split, or of its batches, that each process of a group reads."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from stagesweep.base.view import Batch, View
from stagesweep.parallel.process_group import SINGLE_PROCESS, ProcessGroup


def local_rows(order: list[Tensor], group: ProcessGroup) -> list[Tensor]:
    """The rows of each batch that this process reads; all of a batch smaller than the group."""
    size = group.world_size
    if size == 1:
        return order
    return [rows if len(rows) < size else rows[group.local_slice(len(rows))] for rows in order]


def local_batches(
    view: View, group: ProcessGroup, sharded: bool = False
) -> tuple[Callable[[int], Iterator[Batch]], ProcessGroup]:
    """A process's part of a split, as batches of at most a size, and the group that shares it.

    With fewer samples than processes, each process has all of them. With a sharded model all
    processes have equally many batches, none of them empty: a batch has two samples or more, since
    parts differ by one.
    """
    if group.world_size == 1 or len(view) < group.world_size:
        return view.batches, SINGLE_PROCESS
    rows = torch.arange(len(view))[group.local_slice(len(view))]
    if not sharded:
        return lambda size: view.gather(rows.split(size)), group
    most = group.largest_part(len(view))
    return lambda size: view.gather(rows.tensor_split(-(-most // max(size, 2)))), group
