"""Random numbers: derived seeds, and the state a checkpoint must carry."""

import hashlib
import random
from typing import Any

import numpy as np
import torch


def derive(seed: int, *names: str | int) -> int:
    """A seed of its own for each purpose: a 63-bit hash of the run's seed and `names`."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy (32 bits) and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of every global generator, in types that ``weights_only`` loading allows."""
    _, keys, position, has_gauss, gauss = np.random.get_state()  # type: ignore[misc]
    version, words, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss_next],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every global generator back to a state of `rng_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss_next))
