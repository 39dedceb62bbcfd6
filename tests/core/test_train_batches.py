import torch
from fits import SPEC, columns
from torch import nn

from stagesweep.base.view import View
from stagesweep.config import schema
from stagesweep.core.train_batches import TrainBatches
from stagesweep.parallel.process_group import ProcessGroup


def batches(group: ProcessGroup, undivided: bool = False) -> TrainBatches:
    settings = schema.Fit(epochs=1, loss={}, batch_size=10)
    return TrainBatches(View(columns()), settings, SPEC, 7, group, undivided)


class Noisy(nn.Module):
    def sample_noise(self, n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"noise": torch.randn(n, generator=generator)}


def test_processes_share_the_noise_of_a_batch() -> None:
    whole = Noisy().sample_noise(10, torch.Generator().manual_seed(1))["noise"]
    for rank in range(2):
        group = ProcessGroup(rank, 2)
        part = {"index": torch.arange(10)[group.local_slice(10)]}
        noise = torch.Generator().manual_seed(1)
        found = batches(group).prepare(Noisy(), part, 10, noise)
        assert torch.equal(found["noise"], whole[group.local_slice(10)])


def test_whole_batches_are_read_where_a_term_needs_them() -> None:
    group = ProcessGroup(1, 2)
    order = batches(group).order(0)
    assert [len(rows) for rows in batches(group).local_rows(order)] == [5, 5, 5, 5, 2]
    assert batches(group, undivided=True).local_rows(order) is order
