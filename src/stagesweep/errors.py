"""Errors that a person caused and can mend: one line that names the thing and the remedy."""


class UserError(Exception):
    """A run that cannot go on, said in one line; the command exits with status 1.

    Set HYDRA_FULL_ERROR=1 to see the traceback as well.
    """


class Interrupted(UserError):
    """The run was told to stop (Ctrl-C, SIGTERM); its last checkpoint is saved."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
