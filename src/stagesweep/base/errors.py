"""Errors that a person caused and can mend: one line that names the thing and the remedy."""

from collections.abc import Iterator


class UserError(Exception):
    """A run that cannot go on, said in one line; the command exits with status 1.

    ``reason`` is the word for it in the tables of a sweep. Set HYDRA_FULL_ERROR=1 to see the
    traceback as well.
    """

    reason = "error"


class NotFinite(UserError):
    """A loss, a gradient or an objective became NaN or infinite."""

    reason = "nan"


class OutOfMemory(UserError):
    """The machine has too little memory for the run."""

    reason = "oom"


class Lost(UserError):
    """Another process of the run has ended; what that one says is the reason."""

    reason = "killed"


class Interrupted(UserError):
    """The run was told to stop (Ctrl-C, SIGTERM); its last checkpoint is saved."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum

    def __reduce__(self) -> tuple[type["Interrupted"], tuple[int, str]]:
        return Interrupted, (self.exit_code - 128, str(self))


class Pruned(UserError):
    """The sweep has no more use for this run; its last checkpoint is saved."""


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it, one after the other."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def reason(error: BaseException) -> str:
    """Why a run failed, in the word of a sweep's tables: error, nan or oom."""
    for link in chain(error):
        # torch's own, without importing torch
        if isinstance(link, MemoryError) or type(link).__name__ == "OutOfMemoryError":
            return OutOfMemory.reason
        if isinstance(link, UserError) and link.reason != UserError.reason:
            return link.reason
    return UserError.reason
