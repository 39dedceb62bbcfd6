"""The largest micro-batch that fits, found by trying, and remembered beside the store."""

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stagesweep.base.files import atomic_text, explained
from stagesweep.base.view import Batch
from stagesweep.core.seeding import rng_state, set_rng_state
from stagesweep.core.step import WeightedLoss
from stagesweep.hardware.out_of_memory import out_of_memory
from stagesweep.parallel.process_group import ALONE, Team
from stagesweep.store.store import Store

log = logging.getLogger(__name__)

# The share of the GPU's memory that is used at most, and the number of samples to begin with.
USED, FIRST = 0.9, 8


def find(loss: WeightedLoss, batch: Batch) -> None:
    """Set the micro-batch to as many samples of a stage's batch as fit at once: the number that is
    remembered, or one found by trying, which leaves weights and random generators as they were.
    Of several processes each tries by itself, and all take the least.
    """
    team, loss.team = loss.team, ALONE
    try:
        loss.room.size, loss.room.unknown = agreed(loss, batch, team), False
    finally:
        loss.team = team


def agreed(loss: WeightedLoss, batch: Batch, team: Team) -> int:
    """The number that all processes of a team are to take."""
    about = describe(loss, batch)
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    file = Store.default().root / "micro_batches" / f"{digest}.json"
    how, size = "as was found before", team.share(remembered(file))
    if size is None:
        how, size = "found by trying", -team.most(-tried(loss, batch))[0]
        if team.main:
            with explained(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                atomic_text(file, json.dumps({**about, "micro_batch": size}, indent=1))
    log.info("micro-batch: %d of %d samples, %s", size, about["batch"], how)
    return size


def describe(loss: WeightedLoss, batch: Batch) -> dict[str, Any]:
    """What the memory of a step depends on: model, loss, sample, device and precision."""
    machine = loss.machine
    gpu = machine.device.type == "cuda"
    memory = torch.cuda.get_device_properties(machine.device).total_memory if gpu else None
    shapes = {name: list(p.shape) for name, p in loss.model.named_parameters() if p.requires_grad}
    return {
        "model": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16],
        "terms": {name: type(term).__qualname__ for name, term in loss.terms.items()},
        "sample": {name: [str(c.dtype), *c.shape[1:]] for name, c in sorted(batch.items())},
        "batch": len(batch["index"]),
        "device": torch.cuda.get_device_name(machine.device) if gpu else "cpu",
        "memory": memory,
        "precision": str(machine.precision),
        "compile": machine.compile,
        "activation_checkpointing": machine.activation_checkpointing,
        "torch": torch.__version__,
    }


def remembered(file: Path) -> int | None:
    """What was found before; None when nothing was, or when it cannot be read."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(file.read_text())["micro_batch"])
    return None


def tried(loss: WeightedLoss, batch: Batch) -> int:
    """Real steps with ever more samples, forward and backward with the stage's own loss."""
    state, buffers = rng_state(), {n: b.clone() for n, b in loss.model.named_buffers()}

    def fits(size: int, samples: int | None = None) -> bool:
        # Two pieces, so that there are micro-batches if there will be.
        piece = {name: column[: samples or 2 * size] for name, column in batch.items()}
        return step_fits(loss, piece, size)

    try:
        found = largest(fits, len(batch["index"]))
        # Terms that see the whole batch at once have had only two pieces of it so far.
        while found > 1 and not fits(found, len(batch["index"])):
            found //= 2
    finally:
        set_rng_state(state)
        for name, buffer in loss.model.named_buffers():
            buffer.copy_(buffers[name])
    return max(found, 1)


def step_fits(loss: WeightedLoss, batch: Batch, size: int) -> bool:
    """Whether a step in micro-batches of `size` has room, and leaves a reserve."""
    device = loss.machine.device
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        loss.attempt(batch, 0.0, len(batch["index"]), min(size, len(batch["index"])))
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return False
    finally:
        loss.model.zero_grad()
    if not gpu:
        return True
    usable = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    needed = torch.cuda.max_memory_allocated(device) + optimizer_bytes(loss.model)
    return needed <= USED * usable


def optimizer_bytes(model: nn.Module) -> int:
    """What Adam will hold beside each parameter from its first step on."""
    return sum(2 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` that fits, to about 6 %, by doubling and bisecting; 0 when
    not even one does. What fits is taken to fit in any smaller number as well.
    """
    good, bad = 0, limit + 1
    size = min(FIRST, limit)
    while good < limit and bad > limit:
        if fits(size):
            good, size = size, min(2 * size, limit)
        else:
            bad = size
    while bad - good > max(1, good // 16):
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good
