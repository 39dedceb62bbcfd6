"""Finds the micro-batch of a fit, for ``hardware.micro_batch=auto``."""

import logging
from typing import TYPE_CHECKING

from stagesweep.base.seeding import rng_state, set_rng_state
from stagesweep.base.view import Batch
from stagesweep.hardware.micro_batch_search import memory_key, remember, remembered, search
from stagesweep.hardware.profile import HardwareProfile
from stagesweep.parallel.micro_batches import Forward, Loss, MicroBatches

if TYPE_CHECKING:
    from stagesweep.parallel.fsdp import FSDP

log = logging.getLogger(__name__)


def find_micro_batch(
    micro_batches: MicroBatches,
    forward: Forward,
    loss: Loss,
    hardware: HardwareProfile,
    batch: Batch,
    fsdp: "FSDP | None" = None,
) -> int:
    """The most samples of a stage's batch that fit at once, from the cache or by a search.

    Leaves weights, buffers and random generators as they were. Of several processes each tries by
    itself, and all take the smallest.
    """
    model, group = micro_batches.model, micro_batches.group
    key = memory_key(model, loss.terms, hardware, batch)
    how, size = "from an earlier search", group.broadcast(remembered(key))
    if size is None:
        how = "found by a search"
        single = MicroBatches(model, micro_batches.scaler, hardware, fsdp=fsdp)
        factors = loss.factors(0.0)
        state, buffers = rng_state(), {n: b.clone() for n, b in model.named_buffers()}
        try:
            found = search(
                lambda part, n: single.run(part, forward, loss, factors, len(part["index"]), n),
                model, batch, hardware.device,
            )  # fmt: skip
        finally:
            set_rng_state(state)
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        size = -group.all_reduce_max(-found)[0]
        if group.is_main:
            remember(key, size)
    log.info("micro-batch: %d of %d samples, %s", size, key["batch"], how)
    return size
