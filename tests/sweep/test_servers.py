"""Several controllers on one study: real commands and a real PostgreSQL server."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import pytest
from sqlalchemy.pool import NullPool

if TYPE_CHECKING:
    from conftest import Lab

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("initdb", "pg_ctl", "postgres"))), reason="no PostgreSQL server here"
)
pytest.importorskip("psycopg")
PASSWORD = "between-us"


class Server:
    """A PostgreSQL server with one user, `me`, who has a password."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        # It refuses to run as root.
        self.user: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self.user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        (folder / "password").write_text(PASSWORD)
        (folder / "password").chmod(0o644)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        told = ("--auth=scram-sha-256", f"--pwfile={folder / 'password'}", "--no-sync")
        self.call("initdb", "-D", str(self.data), "--username=me", *told)

    def call(self, *command: str) -> None:
        with (self.folder / "log").open("ab") as log:
            given: dict[str, Any] = {"stdout": log, "stderr": log, **self.user}
            subprocess.run(command, cwd=self.folder, check=True, timeout=120, **given)

    def start(self) -> None:
        where = f"-p {self.port} -h 127.0.0.1 -k {self.folder} -c fsync=off"
        self.call("pg_ctl", "-D", str(self.data), "-w", "-o", where, "start")

    def stop(self) -> None:
        self.call("pg_ctl", "-D", str(self.data), "-m", "immediate", "stop")

    def url(self, password: str = PASSWORD) -> str:
        return f"postgresql+psycopg://me:{password}@127.0.0.1:{self.port}/postgres"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    # Not below pytest's own folder, which is for this user only.
    with tempfile.TemporaryDirectory() as folder:
        made = Server(Path(folder))
        made.start()
        yield made
        made.stop()


def study(lab: "Lab", server: Server) -> optuna.Study:
    """The study of this test, named by its folder."""
    name = next(
        line.split(": ")[1]
        for line in (lab.folder / "sweep" / "sweep.yaml").read_text().splitlines()
        if line.startswith("study: ")
    )
    # No pool, so that connections end with their queries.
    storage = optuna.storages.RDBStorage(server.url(), engine_kwargs={"poolclass": NullPool})
    return optuna.load_study(study_name=name, storage=storage)


def owners(found: optuna.Study) -> set[str]:
    return {trial.user_attrs["owner"] for trial in found.trials}


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def both(lab: "Lab", server: Server, *space: str) -> list[str]:
    """Run the same command twice at once to the end; returns the output of each."""
    names = (f"search.study={lab.folder.name}", f"hydra.sweeper.storage={server.url()}")
    pair = [lab.start(*space, "sweep.slots=1", *names) for _ in range(2)]
    ends = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], ends
    return [said for said, _ in ends]


@pytest.mark.parametrize(
    "space",
    [
        ("stage.toy.x=range(0,10)",),
        ("search=bayes", "search/space=none", "stage.toy.x=interval(0.0,1.0)"),
    ],
    ids=["grid", "bayes"],
)
def test_two_controllers_share_one_total(lab: "Lab", server: Server, space: tuple[str]) -> None:
    for said in both(lab, server, *space, "search.n_trials=10", "stage.toy.seconds=1"):
        assert "10 of 10 trials finished" in said
    found = study(lab, server)
    assert [trial.number for trial in found.trials] == list(range(10))
    assert [trial.state.name for trial in found.trials] == ["COMPLETE"] * 10
    assert len({trial.params["stage.toy.x"] for trial in found.trials}) == 10
    assert len(lab.calls) == 10
    assert len(owners(found)) == 2
    written = [path for path in (lab.folder / "sweep").rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if PASSWORD.encode() in path.read_bytes()]


def test_the_same_point_of_two_controllers_is_run_once(lab: "Lab", server: Server) -> None:
    space = ("search=random", "search/space=none", "stage.toy.x=choice(0,1)")
    both(lab, server, *space, "stage.toy.seconds=2", "search.n_trials=8")
    found = study(lab, server)
    assert [trial.value for trial in found.trials] == [
        trial.params["stage.toy.x"] for trial in found.trials
    ]
    assert len(found.trials) == 8
    assert len(lab.calls) == 2


@pytest.mark.parametrize(
    "ended", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "standing still"]
)
def test_trials_of_a_dead_controller_are_taken_over(
    lab: "Lab", server: Server, ended: signal.Signals
) -> None:
    given = (
        "stage.toy.x=range(0,4)",
        "stage.toy.seconds=8",
        "sweep.slots=1",
        f"search.study={lab.folder.name}",
        f"hydra.sweeper.storage={server.url()}",
    )
    first = lab.start(*given)
    wait_until((lab.folder / "sweep" / "0" / "config.yaml").exists)
    second = lab.start(*given)

    def held(process: "subprocess.Popen[str]") -> list[int]:
        """The running trials of a controller."""
        return [
            trial.number
            for trial in study(lab, server).trials
            if trial.state.name == "RUNNING"
            and f"-{process.pid}-" in trial.user_attrs.get("owner", "")
        ]

    wait_until(lambda: bool(held(first) and held(second)))
    os.kill(first.pid, ended)
    left = held(first)
    assert len(left) == 1
    said, errors = second.communicate(timeout=300)
    assert second.returncode == 0, said + errors
    found = study(lab, server)
    assert [trial.state.name for trial in found.trials] == ["COMPLETE"] * 4
    assert sorted(trial.params["stage.toy.x"] for trial in found.trials) == [0, 1, 2, 3]
    owner = found.trials[left[0]].user_attrs["owner"]
    assert f"-{second.pid}-" in owner
    if ended is signal.SIGSTOP:  # it continues, and finds nothing left to do
        calls = len(lab.calls)
        first.send_signal(signal.SIGCONT)
        said, errors = first.communicate(timeout=120)
        assert first.returncode == 0, said + errors
        assert "4 of 4 trials finished" in said
        assert study(lab, server).trials[left[0]].user_attrs["owner"] == owner
        assert len(lab.calls) == calls
    first.communicate()
    wait_until(lambda: not lab.processes())


def test_a_lost_server_ends_the_sweep_and_the_same_command_resumes(
    lab: "Lab", server: Server
) -> None:
    given = (
        "stage.toy.x=range(0,6)",
        "stage.toy.seconds=2",
        "sweep.slots=2",
        f"search.study={lab.folder.name}",
        f"hydra.sweeper.storage={server.url()}",
    )
    process = lab.start(*given)
    wait_until(lambda: len(lab.calls) >= 2)
    server.stop()
    try:
        said, errors = process.communicate(timeout=120)
        assert process.returncode == 1, said + errors
        last = errors.strip().splitlines()[-1]
        assert last.startswith("stagesweep: hydra.sweeper.storage=postgresql+psycopg://me@127")
        assert last.endswith("when it works again, run the same command to resume")
        assert "Traceback" not in said + errors
        wait_until(lambda: not lab.processes())
    finally:
        server.start()
    done = len(lab.calls)
    assert done < 6
    said, _ = lab.sweep(*given)
    assert "6 of 6 trials finished" in said
    found = study(lab, server)
    assert [trial.state.name for trial in found.trials] == ["COMPLETE"] * 6
    assert sorted(trial.params["stage.toy.x"] for trial in found.trials) == list(range(6))


def test_an_error_of_the_server_is_one_line(lab: "Lab", server: Server, tmp_path: Path) -> None:
    wrong = {
        server.url("a-wrong-one"): "password authentication failed",
        server.url().replace(str(server.port), "1"): "refused",
        server.url().replace("psycopg:", "nodriver:"): "needs the package nodriver",
        "postgre" + "s-no-url": "is not the URL of a usable database",
    }
    for url, line in wrong.items():
        _, errors = lab.sweep("stage.toy.x=0,1", f"hydra.sweeper.storage='{url}'", status=1)
        assert errors.count("\n") == 1, errors
        assert errors.startswith("stagesweep: hydra.sweeper.storage")
        assert line in errors
        assert PASSWORD not in errors
        assert "a-wrong-one" not in errors
