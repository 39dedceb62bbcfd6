"""Seeds, and the state of the random number generators."""

import hashlib
import random
from typing import Any

import numpy as np
import torch


def derive(seed: int, *names: str | int) -> int:
    """Derive a seed for one purpose: a 63-bit hash of the run's seed and `names`."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy (32 bits) and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def torch_state() -> list[torch.Tensor]:
    """State of torch's generators: the CPU's, and that of the current GPU when one is in use."""
    gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *gpu]


def set_torch_state(state: list[torch.Tensor]) -> None:
    """Restore the state that `torch_state` returned."""
    torch.set_rng_state(state[0])
    if state[1:] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[1])


def rng_state() -> dict[str, Any]:
    """State of all global generators, in types that ``weights_only`` loading allows."""
    numpy = dict(np.random.get_state(legacy=False))
    twister = numpy.pop("state")
    version, words, gauss_next = random.getstate()
    return {
        "torch": torch_state(),
        "numpy": numpy | {"pos": twister["pos"], "key": torch.tensor(twister["key"].tolist())},
        "python": [version, torch.tensor(words), gauss_next],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the state that `rng_state` returned."""
    set_torch_state(state["torch"])
    numpy = dict(state["numpy"])
    key = numpy.pop("key").numpy().astype(np.uint32)
    np.random.set_state(numpy | {"state": {"key": key, "pos": numpy.pop("pos")}})
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss_next))
