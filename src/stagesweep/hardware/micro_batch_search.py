"""Searches for the largest micro-batch that fits, and caches it beside the store."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stagesweep.base.files import atomic_text, explained
from stagesweep.base.view import Batch
from stagesweep.hardware.out_of_memory import drop_frames, free_memory, is_out_of_memory
from stagesweep.hardware.profile import HardwareProfile
from stagesweep.store.store import Store

log = logging.getLogger(__name__)

# The largest share of the GPU's memory to use, and the number of samples to start with.
USED, FIRST = 0.9, 8

# Forward and backward of a batch in micro-batches of a size.
Step = Callable[[Batch, int], object]


def memory_key(
    model: nn.Module, terms: Mapping[str, nn.Module], hardware: HardwareProfile, batch: Batch
) -> dict[str, Any]:
    """What the memory of a step depends on: model, loss, sample, device and precision."""
    gpu = hardware.device.type == "cuda"
    memory = torch.cuda.get_device_properties(hardware.device).total_memory if gpu else None
    shapes = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    return {
        "model": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16],
        "terms": {name: type(term).__qualname__ for name, term in terms.items()},
        "sample": {name: [str(c.dtype), *c.shape[1:]] for name, c in sorted(batch.items())},
        "batch": len(batch["index"]),
        "device": torch.cuda.get_device_name(hardware.device) if gpu else "cpu",
        "memory": memory,
        "precision": str(hardware.precision),
        "compile": hardware.compile,
        "activation_checkpointing": hardware.activation_checkpointing,
        "torch": torch.__version__,
    }


def file_of(key: dict[str, Any]) -> Path:
    """The file that caches the micro-batch of a key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return Store.default().root / "micro_batches" / f"{digest}.json"


def remembered(key: dict[str, Any]) -> int | None:
    """The cached micro-batch; None when there is none, or it cannot be read."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(file_of(key).read_text())["micro_batch"])
    return None


def remember(key: dict[str, Any], size: int) -> None:
    """Cache the micro-batch of a key."""
    file = file_of(key)
    with explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_text(file, json.dumps({**key, "micro_batch": size}, indent=1))


def search(step: Step, model: nn.Module, batch: Batch, device: torch.device) -> int:
    """The largest micro-batch for which a `step` of the batch fits; 1 when none does.

    The caller restores random generators and buffers of the model.
    """
    samples = len(batch["index"])

    def fits(size: int, taken: int | None = None) -> bool:
        # Two micro-batches, if there will be several.
        part = {name: column[: taken or 2 * size] for name, column in batch.items()}
        return step_fits(step, model, part, size, device)

    found = largest(fits, samples)
    # Terms that read the whole batch have seen only two micro-batches of it so far.
    while found > 1 and not fits(found, samples):
        found //= 2
    return max(found, 1)


def step_fits(step: Step, model: nn.Module, batch: Batch, size: int, device: torch.device) -> bool:
    """Whether a step in micro-batches of `size` fits and leaves a reserve."""
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        step(batch, min(size, len(batch["index"])))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        drop_frames(error)
        fitted = False
    else:
        fitted = True
    finally:
        model.zero_grad()
    if not fitted:
        free_memory()
    if not fitted or not gpu:
        return fitted
    usable = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    needed = torch.cuda.max_memory_allocated(device) + optimizer_bytes(model)
    return needed <= USED * usable


def optimizer_bytes(model: nn.Module) -> int:
    """Bytes of Adam's moments, which it allocates in its first step."""
    return sum(2 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` that fits, to about 6 %, by doubling and bisecting.

    0 when not even one fits. Assumes that what fits also fits in any smaller number.
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
