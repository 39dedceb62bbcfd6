"""What a model says of a whole split, and how outputs and columns are named."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from stagesweep.data.view import Batch, View
from stagesweep.errors import UserError
from stagesweep.hardware.machine import Machine

Value = TypeVar("Value")


def predict(
    model: nn.Module,
    view: View,
    names: Collection[str] | None,
    machine: Machine,
    batch_size: int = 1024,
) -> dict[str, Tensor]:
    """Outputs and batch columns (see `named`) of a whole split in order, in eval mode, fp32 on the
    CPU; ``names`` None gives every output.
    """
    training = model.training
    model.eval()
    seen: dict[str, list[Tensor]] = {}
    size = min(batch_size, machine.micro_batch or batch_size)
    with torch.inference_mode():
        for batch in view.batches(size):
            batch = to_device(batch, machine.device)
            with torch.autocast(
                machine.device.type, machine.autocast, enabled=machine.autocast is not None
            ):
                outputs = model(batch)
            given = outputs if names is None else pick(names, named(outputs, batch))
            for name, value in given.items():
                value = value.float() if value.is_floating_point() else value
                seen.setdefault(name, []).append(value)
    model.train(training)
    return {name: torch.cat(parts).cpu().clone() for name, parts in seen.items()}


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


def joined(batches: Sequence[Batch]) -> dict[str, np.ndarray]:
    """The columns of all batches, one after the other."""
    return {n: torch.cat([batch[n] for batch in batches]).cpu().numpy() for n in batches[0]}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; in-memory data is there already."""
    if device.type == "cpu":
        return batch
    return {name: column.to(device, non_blocking=True) for name, column in batch.items()}
