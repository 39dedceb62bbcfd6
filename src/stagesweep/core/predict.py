"""What a model says of a whole split, and how outputs and columns are named."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from stagesweep.base.errors import UserError
from stagesweep.base.view import Batch, View
from stagesweep.hardware.out_of_memory import Room
from stagesweep.hardware.profile import Machine
from stagesweep.parallel.process_group import ALONE, Team

Value = TypeVar("Value")


def predict(
    model: nn.Module,
    view: View,
    names: Collection[str] | None,
    machine: Machine,
    batch_size: int = 1024,
    oom: list[dict[str, Any]] | None = None,
    team: Team = ALONE,
    divided: bool = False,
) -> dict[str, Tensor]:
    """Outputs and batch columns (see `named`) of a whole split in order, in eval mode, fp32 on the
    CPU; ``names`` None gives every output. In smaller batches when the device has too little
    memory, which is then added to `oom` (see `Room.events`). Each process of a `team` computes its
    part, and all get the whole; of a `divided` model each has a part as well.
    """
    training = model.training
    model.eval()
    room = Room(machine.micro_batch, "prediction", machine, fixed=divided)
    part, sharing = share_of(view, team, divided)
    try:
        found = room.within(
            lambda size: _predict(model, part(size), names, machine, divided),
            min(batch_size, len(view)),
        )
    finally:
        if oom is not None:
            oom += room.events
        model.train(training)
    return {name: sharing.gather(own, len(view)) for name, own in found.items()}


def _predict(
    model: nn.Module,
    batches: Iterable[Batch],
    names: Collection[str] | None,
    machine: Machine,
    divided: bool,
) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {}
    # A divided model is collected into memory that training uses, too.
    with torch.no_grad() if divided else torch.inference_mode():
        for batch in batches:
            batch = to_device(batch, machine.device)
            with torch.autocast(
                machine.device.type, machine.autocast, enabled=machine.autocast is not None
            ):
                outputs = model(batch)
            given = outputs if names is None else pick(names, named(outputs, batch))
            for name, value in given.items():
                value = value.float() if value.is_floating_point() else value
                seen.setdefault(name, []).append(value)
    return {name: torch.cat(parts).cpu().clone() for name, parts in seen.items()}


def share_of(
    view: View, team: Team, divided: bool = False
) -> tuple[Callable[[int], Iterator[Batch]], Team]:
    """A process's part of a split, in batches of a size at most, and whom it shares the split with:
    of fewer samples than there are processes, each has all.

    Of a `divided` model all processes have the same number of batches, none of them empty: of two
    samples at the least, for parts differ by one.
    """
    if team.size == 1 or len(view) < team.size:
        return view.batches, ALONE
    rows = torch.arange(len(view))[team.part(len(view))]
    if not divided:
        return lambda size: view.gather(rows.split(size)), team
    most = team.largest(len(view))
    return lambda size: view.gather(rows.tensor_split(-(-most // max(size, 2)))), team


def named(outputs: Mapping[str, Value], columns: Mapping[str, Value]) -> dict[str, Value]:
    """Model outputs and batch columns by name.

    An output wins over a column of its name; ``input/<name>`` is the column in any case.
    """
    return {**columns, **{f"input/{name}": c for name, c in columns.items()}, **outputs}


def pick(names: Collection[str], there: Mapping[str, Value]) -> dict[str, Value]:
    """Those of `names`; UserError lists what there is."""
    for name in names:
        if name not in there:
            have = ", ".join(sorted(n for n in there if not n.startswith("input/")))
            raise UserError(
                f"the model gives no '{name}' and the data has no such column; there are {have}"
            )
    return {name: there[name] for name in names}


def read_by(metrics: Iterable[Any]) -> set[str] | None:
    """The arrays that metrics look at, as they say in `reads`; None when one does not say.

    A split is kept for them, and counts of a hundred thousand cells would fill the memory.
    """
    found: set[str] = set()
    for metric in metrics:
        if not hasattr(metric, "reads"):
            return None
        found |= set(metric.reads)
    return found


def joined(batches: Sequence[Batch], team: Team = ALONE, samples: int = 0) -> dict[str, np.ndarray]:
    """The columns of all batches, one after the other: of all `samples` that the team shares."""
    found = {name: torch.cat([batch[name] for batch in batches]).cpu() for name in batches[0]}
    return {name: team.gather(column, samples).numpy() for name, column in found.items()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; in-memory data is there already."""
    if device.type == "cpu":
        return batch
    return {name: column.to(device, non_blocking=True) for name, column in batch.items()}
