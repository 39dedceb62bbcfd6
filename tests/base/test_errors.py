import errno
import pickle

import pytest
from sqlalchemy.exc import OperationalError

from stagesweep.base.errors import Interrupted, Lost, NotFinite, OutOfMemory, UserError, reason


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("no"), "error"),
        (ValueError("no"), "error"),
        (NotFinite("nan"), "nan"),
        (OutOfMemory("full"), "oom"),
        (MemoryError(), "oom"),
        (Lost("gone"), "killed"),
        (OSError(errno.ENOSPC, "No space left on device"), "environment"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "environment"),
        (OSError(errno.EROFS, "Read-only file system"), "environment"),
        (OSError(errno.EIO, "Input/output error"), "environment"),
        (OSError(errno.EACCES, "Permission denied"), "error"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), "error"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "environment"),
        (RuntimeError("No CUDA GPUs are available"), "environment"),
        (RuntimeError("CUDA error: device-side assert triggered"), "error"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "error"),
        (
            OperationalError("connection refused", None, Exception("Connection refused")),
            "environment",
        ),
        (OperationalError("no such table: x", None, Exception("no such table: x")), "error"),
    ],
)
def test_the_reason_of_a_failure(error: BaseException, expected: str) -> None:
    assert reason(error) == expected
    outer = RuntimeError("outer")
    outer.__cause__ = error
    assert reason(outer) == expected


def test_an_interruption_can_be_sent_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(Interrupted(15, "stopped")))
    assert (error.exit_code, str(error)) == (143, "stopped")
