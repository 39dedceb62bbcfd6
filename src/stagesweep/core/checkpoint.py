"""Checkpoints: written whole or not at all, read without running code from the file."""

import logging
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from stagesweep.base.errors import UserError
from stagesweep.base.files import atomic_write, link

log = logging.getLogger(__name__)

NOTHING: Mapping[str, Any] = {}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values to `path`; on any failure the old file is still there."""
    atomic_write(path, lambda stream: torch.save(state, stream))


def load(path: Path, own: Mapping[str, Any] = NOTHING) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; UserError names a missing, truncated or foreign file.

    Of a folder, which several processes wrote, a part of what is divided in one's `own` state (see
    `shard.read`).
    """
    if not path.exists():
        raise UserError(f"no checkpoint at {path}")
    try:
        with warnings.catch_warnings(action="ignore"):
            if path.is_dir():
                from stagesweep.parallel import fsdp

                state = fsdp.read(path, own)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader trip over anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot read checkpoint {path}: truncated or foreign ({reason})"
        ) from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"cannot read checkpoint {path}: foreign (it holds no 'model' weights)")
    return state


def save_numbered(folder: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Write ``step_<n>.pt``, point ``last.pt`` at it and keep the `keep` newest up to it."""
    newest = folder / f"step_{step:09d}.pt"
    save(newest, state)
    link(newest, folder / "last.pt")
    keep_newest(folder, newest, keep)


def keep_newest(folder: Path, newest: Path, keep: int) -> None:
    """Remove all checkpoints but the newest one and `keep` - 1 before it.

    Any of a later step is one that could not be read, or the fit would have gone on from there.
    """
    found = numbered(folder)
    last = found.index(newest) + 1
    for other in found[: max(last - keep, 0)] + found[last:]:
        if other.is_dir():
            shutil.rmtree(other)
        else:
            other.unlink()


def numbered(folder: Path) -> list[Path]:
    """The checkpoints of a fit, oldest first: files, and folders that several processes wrote."""
    return sorted(folder.glob("step_*"))


def load_newest(
    folder: Path, load: Callable[[Path], dict[str, Any]] = load
) -> dict[str, Any] | None:
    """The newest readable checkpoint of a fit, None when there is none yet.

    A broken one is named in a warning and the one before it is used; when every one is broken,
    UserError names the oldest.
    """
    found = numbered(folder)[::-1]
    for number, path in enumerate(found):
        try:
            return load(path)
        except UserError as error:
            if number + 1 == len(found):
                raise UserError(
                    f"{error}; no older one to fall back to: set resume=never"
                ) from None
            log.warning("%s; falling back to %s", error, found[number + 1].name)
    return None
