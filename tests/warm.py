"""Runs the command in processes forked from this one, which has imported all modules.

A line of JSON on stdin starts a process; its process id is written to stdout, its exit status to
a file. A new interpreter would need seconds for its imports, which is most of a small run.
"""

import fcntl
import gc
import io
import json
import os
import pkgutil
import runpy
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing import util
from pathlib import Path
from typing import Any, NoReturn

import optuna
from hydra.core.plugins import Plugins
from matplotlib.figure import Figure

# Modules that read the environment, or change the process, when they are imported.
NOT_SHARED = ("stagesweep.__main__", "stagesweep.cli", "stagesweep.sweep.engine.fork_server")


def main() -> None:
    """Import all modules and rehearse a run, then fork one process for each line on stdin."""
    import stagesweep
    from stagesweep.base.compat import OPTIMIZER_IMPORTS
    from stagesweep.config import register
    from stagesweep.store import fingerprint
    from stagesweep.sweep.engine.rehearsal import rehearse

    for module in pkgutil.walk_packages(stagesweep.__path__, "stagesweep."):
        if module.name not in NOT_SHARED:
            import_module(module.name)
    assert "stagesweep.cli" not in sys.modules
    import_module(OPTIMIZER_IMPORTS)
    register.register()
    Plugins.instance()
    rehearse()
    fingerprint.freeze(sorted(name for name in sys.modules if name.startswith("stagesweep.")))
    use_libraries()
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not os.fork():
            return supervise(Path(asked.pop("status")), asked)
    return None


def use_libraries() -> None:
    """Store a trial and draw a figure: SQLAlchemy and matplotlib set themselves up at first use."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage="sqlite://")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    optuna.logging.set_verbosity(verbosity)
    figure = Figure(layout="constrained")
    figure.add_subplot().plot([0, 1])
    figure.savefig(io.BytesIO(), format="svg")


def supervise(status: Path, asked: Mapping[str, Any]) -> None:
    """Fork the command, wait for its end and write its exit status."""
    child = os.fork()
    if child:
        print(child, flush=True)
        part = status.with_suffix(".part")
        part.write_text(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
        part.rename(status)
        os._exit(0)
    become(**asked)
    wait_to_serve()
    runpy.run_module("stagesweep", run_name="__main__", alter_sys=True)


def wait_to_serve() -> None:
    """Fork a process that becomes the fork server of a sweep.

    multiprocessing would start a new interpreter for the server. Only its first start is replaced.
    """
    ours, theirs = socket.socketpair()
    waiting = os.fork()
    if not waiting:
        ours.close()
        serve(theirs)
    theirs.close()
    start: Callable[[Any, list[str], list[int]], int] = util.spawnv_passfds

    def take_over(path: Any, command: list[str], passed: list[int]) -> int:
        if "multiprocessing.forkserver" not in command[-1]:
            return start(path, command, passed)
        util.spawnv_passfds = start  # type: ignore[attr-defined]
        order = {"code": command[-1], "files": passed, "environment": dict(os.environ)}
        with ours:
            socket.send_fds(ours, [json.dumps(order).encode()], passed)
        return waiting

    util.spawnv_passfds = take_over  # type: ignore[attr-defined]


def serve(orders: socket.socket) -> NoReturn:
    """Wait for the code of the server and its open files; exit when the command exits."""
    try:
        message, received, *_ = socket.recv_fds(orders, 1 << 20, 8)
        if message:
            order = json.loads(message)
            os.environ.clear()
            os.environ.update(order["environment"])
            read_trust()
            # In two steps, because the numbers wanted may be among those received.
            apart = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 1000) for descriptor in received]
            for descriptor in received:
                os.close(descriptor)
            for descriptor, wanted in zip(apart, order["files"], strict=True):
                os.dup2(descriptor, wanted, inheritable=False)
                os.close(descriptor)
            exec(order["code"], {"__name__": "__main__"})
    finally:
        os._exit(0)


def read_trust() -> None:
    """Read the user's trust list again, as a new process does when it imports the module."""
    trust = import_module("stagesweep.config.trust")
    trust.added = trust.read()


def become(
    arguments: Sequence[str], folder: str, environment: Mapping[str, str], files: Sequence[str]
) -> None:
    """Turn this process into one started there with these arguments and an empty stdin."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    read_trust()
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = ["stagesweep", *arguments]
    for descriptor, path in enumerate((os.devnull, *files)):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if descriptor else os.O_RDONLY
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin = os.fdopen(0)  # the old one has buffered lines of the parent


if __name__ == "__main__":
    main()
