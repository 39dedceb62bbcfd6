"""Atomic writes, links, and file-system errors as one-line messages."""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from stagesweep.base.errors import DISK_ERRORS, EnvironmentFailure, MissingFile, UserError

_SUFFIX = ".tmp"
_ELSEWHERE = "set STAGESWEEP_STORE or hydra.run.dir to another place"


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: ``write(stream)`` fills it, and then it gets the name ``path``.

    The bytes go to a temporary file in the same folder (made when missing), which is synced and
    renamed: after a crash at any moment, ``path`` is the old file or the new one.

    UserError when the file system refuses (full, read-only, no permission); no file is left then.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        _remove(temporary)  # first, so that the free space named is the space that will be free
        raise file_error(refusal, path) from error
    finally:
        _remove(temporary)


def atomic_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 with :func:`atomic_write`."""
    atomic_write(path, lambda stream: stream.write(text.encode()))


def link(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to ``source``, or a copy where links do not work.

    An existing ``target`` is replaced in one step. UserError when ``source`` cannot be read or
    ``target`` cannot be written.
    """
    temporary = _temporary(target)
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, temporary)
        temporary.replace(target)
    except OSError:
        with explained(source), source.open("rb") as stream:
            atomic_write(target, lambda copy: shutil.copyfileobj(stream, copy, 1 << 20))
    finally:
        # rename() does nothing when both names are links to one file, so the temporary may remain.
        _remove(temporary)


def is_temporary(path: Path) -> bool:
    """Whether ``path`` is the unfinished file of a write that was killed."""
    return path.name.startswith(".") and path.name.endswith(_SUFFIX)


def file_error(error: OSError, path: Path) -> UserError:
    """Turn an error of the file system at ``path`` into one line with the remedy."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            problem = f"disk full: cannot write {path}{_free(path)}"
            remedy = f"free space, or {_ELSEWHERE}"
        case errno.EACCES | errno.EPERM:
            problem = f"no permission for {path}"
            remedy = f"change the rights of its folder, or {_ELSEWHERE}"
        case errno.EROFS:
            problem = f"read-only file system: cannot write {path}"
            remedy = _ELSEWHERE
        case errno.ENOENT:
            problem = f"no such file: {path}"
            remedy = "something removed it; run the same command again"
            return MissingFile(f"{problem}; {remedy}", str(path))
        case _:
            problem = f"cannot use {path}: {error.strerror or error}"
            remedy = f"check the disk, or {_ELSEWHERE}"
    kind = EnvironmentFailure if error.errno in DISK_ERRORS else UserError
    return kind(f"{problem}; {remedy}")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raise an OSError of the block as the UserError of :func:`file_error`."""
    try:
        yield
    except OSError as error:
        raise file_error(error, path) from error


def _temporary(path: Path) -> Path:
    # A fixed length: file names are limited to 255 bytes.
    return path.with_name(f".{secrets.token_hex(8)}{_SUFFIX}")


def _remove(temporary: Path) -> None:
    with suppress(OSError):
        temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can sync a folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _refusal(error: Exception) -> OSError | None:
    """The OSError of a failed write; torch.save hides a full disk behind a RuntimeError."""
    if isinstance(error, OSError):
        return error
    hidden = None if isinstance(error, UserError) else error.__context__
    # An error of a write to an open stream has no file name; other errors are not of this write.
    return hidden if isinstance(hidden, OSError) and hidden.filename is None else None


def _free(path: Path) -> str:
    try:
        return f" ({shutil.disk_usage(path.parent).free / 1e6:.1f} MB free)"
    except OSError:
        return ""
