"""Evaluates a model on a split: the per-sample loss terms and the metrics of the stage."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stagesweep.base.view import Batch, View
from stagesweep.core.loss import WeightedLoss
from stagesweep.core.predict import (
    by_name,
    concatenate,
    forward,
    metric_inputs,
    pick,
    to_device,
)
from stagesweep.hardware.out_of_memory import OutOfMemoryRetry
from stagesweep.parallel.local_batches import local_batches
from stagesweep.parallel.process_group import ProcessGroup


def evaluate(
    model: nn.Module,
    view: View,
    loss: WeightedLoss,
    metrics: Mapping[str, Any],
    retry: OutOfMemoryRetry,
    group: ProcessGroup,
    sharded: bool,
) -> dict[str, float]:
    """Means of the loss terms and values of the metrics, ``val_<name>``, with full weights.

    The metrics are computed by the main process alone.
    """
    model.eval()
    batches, sharing = local_batches(view, group, sharded)
    sums, seen = retry.run(
        lambda size: _sums_and_arrays(model, batches(size), loss, metrics, retry),
        min(1024, len(view)),
    )
    row: dict[str, float] = {}
    if loss.per_sample:
        row = loss.metrics(sharing.all_reduce(sums), loss.per_sample, "val")
    if seen:
        arrays = concatenate(seen, sharing, len(view))
        for metric in metrics.values() if group.is_main else ():
            row |= {f"val_{name}": float(value) for name, value in metric(arrays).items()}
    return row


@torch.no_grad()
def _sums_and_arrays(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: WeightedLoss,
    metrics: Mapping[str, Any],
    retry: OutOfMemoryRetry,
) -> tuple[Tensor, list[Batch]]:
    """Totals and weights of per-sample terms, (terms, 2), and the arrays that the metrics read."""
    hardware = retry.hardware
    sums = torch.zeros(len(loss.per_sample), 2, device=hardware.device)
    wanted = metric_inputs(metrics.values())
    seen: list[Batch] = []
    for batch in batches:
        batch = to_device(batch, hardware.device)
        outputs = forward(model, hardware, batch)
        sums += torch.stack(loss.sums(loss.per_sample, outputs, batch), 1)
        if metrics:
            arrays = by_name(outputs, batch)
            seen.append(arrays if wanted is None else pick(wanted, arrays))
    return sums, seen
