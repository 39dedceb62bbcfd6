import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest

from stagesweep.base.errors import Interrupted
from stagesweep.base.signals import deferred, handled, pending, stop

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]


Work = Callable[[], None]


def stopped(work: Work) -> Interrupted:
    """What stops `work`, done inside a run."""
    with pytest.raises(Interrupted) as caught, handled():
        work()
    return caught.value


@pytest.mark.parametrize(("signum", "code"), SIGNALS)
def test_a_signal_outside_a_deferred_block_stops_at_once(signum: signal.Signals, code: int) -> None:
    done = []

    def work() -> None:
        signal.raise_signal(signum)
        done.append("more")

    stop = stopped(work)
    assert done == []
    assert stop.exit_code == code
    assert str(stop) == f"stopped by {signum.name}; run the same command to resume"


@pytest.mark.parametrize(("signum", "code"), SIGNALS)
def test_a_deferred_signal_is_pending(signum: signal.Signals, code: int) -> None:
    done = []

    def work() -> None:
        with deferred():
            assert not pending()
            signal.raise_signal(signum)
            done.append("step")
            if held := pending():
                done.append("save")
                raise stop(held)

    assert stopped(work).exit_code == code
    assert done == ["step", "save"]


def test_a_deferred_signal_is_raised_at_the_end_of_the_block() -> None:
    done = []

    def work() -> None:
        with deferred():
            signal.raise_signal(signal.SIGTERM)
            done.append("the last save")
        done.append("the next stage")

    stopped(work)
    assert done == ["the last save"]


def test_a_second_signal_stops_at_once() -> None:
    done = []

    def work() -> None:
        with deferred():
            signal.raise_signal(signal.SIGINT)
            done.append("first")
            signal.raise_signal(signal.SIGINT)
            done.append("second")

    stopped(work)
    assert done == ["first"]


def test_an_error_in_the_block_is_not_hidden_by_a_signal() -> None:
    def work() -> None:
        with handled(), deferred():
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        work()


def test_handlers_are_restored() -> None:
    def held_back() -> None:
        with deferred():
            signal.raise_signal(signal.SIGTERM)

    before = [signal.getsignal(s) for s, _ in SIGNALS]
    stopped(held_back)
    assert [signal.getsignal(s) for s, _ in SIGNALS] == before
    with deferred():
        assert not pending()
    stopped(lambda: signal.raise_signal(signal.SIGTERM))


PROGRAM = textwrap.dedent(
    """
    import sys, time
    from stagesweep.base.signals import deferred, handled, pending, stop
    from stagesweep.base.errors import Interrupted

    try:
        with handled():
            if sys.argv[1] == "waiting":
                print("ready", flush=True)
                time.sleep(60)
            with deferred():
                print("ready", flush=True)
                while not pending():
                    time.sleep(0.001)
                print("saved", flush=True)
                raise stop(pending())
    except Interrupted as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    """
)


@pytest.mark.parametrize(("signum", "code"), SIGNALS)
@pytest.mark.parametrize(("where", "left"), [("waiting", ""), ("fitting", "saved\n")])
def test_a_real_process(signum: signal.Signals, code: int, where: str, left: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, where],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signum)
    out, errors = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, left)
    assert errors == f"stopped by {signum.name}; run the same command to resume\n"
