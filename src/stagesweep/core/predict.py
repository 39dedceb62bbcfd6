"""Forward passes, of one batch and of a whole split."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from stagesweep.base.errors import UserError
from stagesweep.base.view import Batch, View
from stagesweep.hardware.out_of_memory import OutOfMemoryRetry
from stagesweep.hardware.profile import HardwareProfile
from stagesweep.parallel.local_batches import local_batches
from stagesweep.parallel.process_group import SINGLE_PROCESS, ProcessGroup

Value = TypeVar("Value")


def forward(model: nn.Module, hardware: HardwareProfile, batch: Batch) -> dict[str, Tensor]:
    """Model outputs under the precision of the profile, returned as fp32."""
    if hardware.autocast is None:
        outputs: dict[str, Tensor] = model(batch)
        return outputs
    with torch.autocast(hardware.device.type, hardware.autocast):
        outputs = model(batch)
    return {k: v.float() if v.is_floating_point() else v for k, v in outputs.items()}


def predict(
    model: nn.Module,
    view: View,
    names: Collection[str] | None,
    hardware: HardwareProfile,
    batch_size: int = 1024,
    oom: list[dict[str, Any]] | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
    sharded: bool = False,
) -> dict[str, Tensor]:
    """Outputs and batch columns (see `by_name`) of a whole split in order, in eval mode, as fp32 on
    the CPU; ``names`` None gives every output.

    Uses smaller batches when the device runs out of memory, and adds these events to `oom` (see
    `OutOfMemoryRetry`). Each process of a `group` computes its part, and all return the whole.
    """
    training = model.training
    model.eval()
    retry = OutOfMemoryRetry(hardware.micro_batch, "prediction", hardware, can_retry=not sharded)
    batches, sharing = local_batches(view, group, sharded)
    try:
        found = retry.run(
            lambda size: _predict(model, batches(size), names, hardware, sharded),
            min(batch_size, len(view)),
        )
    finally:
        if oom is not None:
            oom += retry.events
        model.train(training)
    return {name: sharing.all_gather(own, len(view)) for name, own in found.items()}


def _predict(
    model: nn.Module,
    batches: Iterable[Batch],
    names: Collection[str] | None,
    hardware: HardwareProfile,
    sharded: bool,
) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {}
    # A sharded model is gathered into memory that training uses too.
    with torch.no_grad() if sharded else torch.inference_mode():
        for batch in batches:
            batch = to_device(batch, hardware.device)
            with torch.autocast(
                hardware.device.type, hardware.autocast, enabled=hardware.autocast is not None
            ):
                outputs = model(batch)
            given = outputs if names is None else pick(names, by_name(outputs, batch))
            for name, value in given.items():
                value = value.float() if value.is_floating_point() else value
                seen.setdefault(name, []).append(value)
    return {name: torch.cat(parts).cpu().clone() for name, parts in seen.items()}


def by_name(outputs: Mapping[str, Value], columns: Mapping[str, Value]) -> dict[str, Value]:
    """Model outputs and batch columns by name.

    An output hides the column of its name; ``input/<name>`` is always the column.
    """
    return {**columns, **{f"input/{name}": c for name, c in columns.items()}, **outputs}


def pick(names: Collection[str], there: Mapping[str, Value]) -> dict[str, Value]:
    """The entries of `names`; UserError lists the known names."""
    for name in names:
        if name not in there:
            have = ", ".join(sorted(n for n in there if not n.startswith("input/")))
            raise UserError(
                f"the model gives no '{name}' and the data has no such column; there are {have}"
            )
    return {name: there[name] for name in names}


def metric_inputs(metrics: Iterable[Any]) -> set[str] | None:
    """Names of the arrays that metrics list in `reads`; None when one lists none.

    Only these are kept of a split: the counts of 100,000 cells would fill the memory.
    """
    found: set[str] = set()
    for metric in metrics:
        if not hasattr(metric, "reads"):
            return None
        found |= set(metric.reads)
    return found


def concatenate(
    batches: Sequence[Batch], group: ProcessGroup = SINGLE_PROCESS, samples: int = 0
) -> dict[str, np.ndarray]:
    """The columns of all batches in order, of all `samples` that a group shares."""
    found = {name: torch.cat([batch[name] for batch in batches]).cpu() for name in batches[0]}
    return {name: group.all_gather(column, samples).numpy() for name, column in found.items()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; data in memory is there already."""
    if device.type == "cpu":
        return batch
    return {name: column.to(device, non_blocking=True) for name, column in batch.items()}
