import pickle

import pytest

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
