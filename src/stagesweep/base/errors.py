"""Errors that the user can fix: one line that names the cause and the remedy."""

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


def reason(error: BaseException) -> str:
    """Why a run failed: error, nan or oom, as in the tables of a sweep."""
    for link in chain(error):
        # torch's error, recognized without importing torch
        if isinstance(link, MemoryError) or type(link).__name__ == "OutOfMemoryError":
            return OutOfMemory.reason
        if isinstance(link, UserError) and link.reason != UserError.reason:
            return link.reason
    return UserError.reason
