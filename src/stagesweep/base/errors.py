"""Errors that the user can fix: one line that names the cause and the remedy."""

import errno
import os
from collections.abc import Iterator


class UserError(Exception):
    """Ends a run with a one-line message and exit status 1.

    ``reason`` is its name in the tables of a sweep. HYDRA_FULL_ERROR=1 shows the traceback too.
    """

    reason = "error"


class NotFinite(UserError):
    """A loss, a gradient or an objective became NaN or infinite."""

    reason = "nan"


class OutOfMemory(UserError):
    """The machine has too little memory for the run."""

    reason = "oom"


class Lost(UserError):
    """Another process of the run has ended; its own error is the cause."""

    reason = "killed"


class EnvironmentFailure(UserError):
    """The disk, a device or a database failed: the run itself is not the cause."""

    reason = "environment"


class MissingFile(UserError):
    """A file or folder that the run reads does not exist."""

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path

    def __reduce__(self) -> tuple[type["MissingFile"], tuple[str, str]]:
        return MissingFile, (str(self), self.path)


class FailedTrials(UserError):
    """Trials of a sweep failed alike; the message is all of their error, of one line or several."""


class Interrupted(UserError):
    """A signal stopped the run (Ctrl-C, SIGTERM, SIGUSR1); its last checkpoint is saved."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum

    def __reduce__(self) -> tuple[type["Interrupted"], tuple[int, str]]:
        return Interrupted, (self.exit_code - 128, str(self))


class Pruned(UserError):
    """The sweep pruned this run; its last checkpoint is saved."""


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, its cause, the cause of that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


# Errors that count as failures of the disk, not of the run: full, read-only, broken, or no longer
# mounted.
DISK_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO} | {errno.ESTALE, errno.ENODEV, errno.ENXIO}
)
# Texts of errors that libraries raise without a type of their own. An illegal address or a failed
# assertion on a GPU is missing here, because the run may be the cause.
_TEXTS = (
    "no space left on device",
    "disk quota exceeded",
    "read-only file system",
    "input/output error",
    "ecc error",
    "cuda driver error",
    "driver version is insufficient",
    "driver/library version mismatch",
    "no cuda-capable device",
    "no cuda gpus are available",
    "cuda unknown error",
    "cuda error: unknown error",
    "cuda error: initialization error",
    "devices unavailable",
    "gpu is lost",
    "fallen off the bus",
    "system not yet initialized",
    "hardware stack error",
)
_DATABASE_ERRORS = ("OperationalError", "InterfaceError", "StorageInternalError")
_DATABASE_TEXTS = (
    "connection refused",
    "could not connect",
    "connection failed",
    "connection timed out",
    "timeout expired",
    "could not translate host name",
    "failed to resolve host",
    "server closed the connection",
    "terminating connection",
    "connection is closed",
    "is full",
    "disk i/o error",
    "unable to open database file",
    "readonly database",
)


def reason(error: BaseException) -> str:
    """Why a run failed: error, nan, oom or environment, as in the tables of a sweep."""
    for link in chain(error):
        # torch's error, recognized without importing torch
        if isinstance(link, MemoryError) or type(link).__name__ == "OutOfMemoryError":
            return OutOfMemory.reason
        if isinstance(link, UserError) and link.reason != UserError.reason:
            return link.reason
        if _is_of_environment(link):
            return EnvironmentFailure.reason
    return UserError.reason


def _is_of_environment(error: BaseException) -> bool:
    """Whether one error, without its causes, comes from the disk, a device or a database."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in DISK_ERRORS
    text = str(error).lower()
    if type(error).__name__ in _DATABASE_ERRORS:
        return any(part in text for part in _DATABASE_TEXTS)
    return isinstance(error, OSError | RuntimeError) and any(part in text for part in _TEXTS)


def missing_file(error: BaseException) -> str | None:
    """The path of the file whose absence made a run fail; None if it failed otherwise."""
    for link in chain(error):
        if isinstance(link, MissingFile):
            return link.path
        if isinstance(link, FileNotFoundError) and isinstance(link.filename, str | bytes):
            return str(os.fsdecode(link.filename))
    return None
