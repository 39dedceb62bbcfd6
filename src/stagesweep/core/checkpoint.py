"""Checkpoint files: written atomically, and read without running code from them."""

import logging
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stagesweep.base.errors import UserError
from stagesweep.base.files import atomic_write, link

if TYPE_CHECKING:
    from stagesweep.parallel.fsdp import FSDP

log = logging.getLogger(__name__)

NOTHING: Mapping[str, Any] = {}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values to `path`; on any failure the old file is still there."""
    atomic_write(path, lambda stream: torch.save(state, stream))


def load(path: Path, own: Mapping[str, Any] = NOTHING) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; UserError names a missing, truncated or foreign file.

    A sharded checkpoint is a folder; returns this process's part of each tensor that is sharded in
    its `own` state, and the other tensors in full.
    """
    if not path.exists():
        raise UserError(f"no checkpoint at {path}")
    try:
        with warnings.catch_warnings(action="ignore"):
            if path.is_dir():
                from stagesweep.parallel import fsdp

                state = fsdp.read_state(path, own, load)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot read checkpoint {path}: truncated or foreign ({reason})"
        ) from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"cannot read checkpoint {path}: foreign (it holds no 'model' weights)")
    return state


def save_numbered(folder: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Write ``step_<n>.pt``, link ``last.pt`` to it and keep the `keep` newest up to it."""
    newest = folder / f"step_{step:09d}.pt"
    save(newest, state)
    link(newest, folder / "last.pt")
    keep_newest(folder, newest, keep)


def save_sharded(
    folder: Path, step: int, state: dict[str, Any], keep: int, sharding: "FSDP"
) -> None:
    """Write the folder ``step_<n>``, each process its part, and keep the `keep` newest up to it.

    UserError where a process cannot write.
    """
    newest = folder / f"step_{step:09d}"
    sharding.write_state(newest, state, save)
    if sharding.group.is_main:
        keep_newest(folder, newest, keep)
    sharding.group.barrier()


def keep_newest(folder: Path, newest: Path, keep: int) -> None:
    """Remove all checkpoints except `newest` and the `keep` - 1 before it.

    Checkpoints of later steps could not be read, or the fit would have resumed from them.
    """
    found = numbered(folder)
    last = found.index(newest) + 1
    for other in found[: max(last - keep, 0)] + found[last:]:
        if other.is_dir():
            shutil.rmtree(other)
        else:
            other.unlink()


def numbered(folder: Path) -> list[Path]:
    """The checkpoints of a fit, oldest first: files, or folders if sharded."""
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
