"""Runs the command in processes forked from this one, which has imported what it may need.

A line of JSON on stdin asks for one, its process id on stdout is the answer; its exit status is
left in a file. A new interpreter takes seconds more, which is most of what a small run takes.
"""

import fcntl
import gc
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

# What looks at the environment or changes the process when it is imported.
EACH = ("stagesweep.__main__", "stagesweep.cli", "stagesweep.sweep.engine.fork_server")


def main() -> None:
    """Import, then fork until nothing more is asked."""
    import stagesweep

    for module in pkgutil.walk_packages(stagesweep.__path__, "stagesweep."):
        if module.name not in EACH:
            import_module(module.name)
    assert "stagesweep.cli" not in sys.modules
    import_module("torch._dynamo")  # by the first optimizer
    gc.freeze()
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not os.fork():
            return watch(Path(asked.pop("status")), asked)
    return None


def watch(left: Path, asked: Mapping[str, Any]) -> None:
    """Fork the command and wait for its end; or be the command."""
    child = os.fork()
    if child:
        print(child, flush=True)
        part = left.with_suffix(".part")
        part.write_text(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
        part.rename(left)
        os._exit(0)
    become(**asked)
    wait_to_serve()
    runpy.run_module("stagesweep", run_name="__main__", alter_sys=True)


def wait_to_serve() -> None:
    """Fork what becomes the server that the trials of a sweep are forked from, when multiprocessing
    would start a new interpreter for it; a second one it starts as always.
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
    """Wait for what to run, with which open files; the end of the command is the end of this."""
    try:
        message, received, *_ = socket.recv_fds(orders, 1 << 20, 8)
        if message:
            order = json.loads(message)
            os.environ.clear()
            os.environ.update(order["environment"])
            # By way of numbers that nothing has: those that are wanted may be among the received.
            apart = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 1000) for descriptor in received]
            for descriptor in received:
                os.close(descriptor)
            for descriptor, wanted in zip(apart, order["files"], strict=True):
                os.dup2(descriptor, wanted, inheritable=False)
                os.close(descriptor)
            exec(order["code"], {"__name__": "__main__"})
    finally:
        os._exit(0)


def become(
    arguments: Sequence[str], folder: str, environment: Mapping[str, str], files: Sequence[str]
) -> None:
    """Be as a process that was started there with these arguments, and nothing on stdin."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = ["stagesweep", *arguments]
    for descriptor, path in enumerate((os.devnull, *files)):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if descriptor else os.O_RDONLY
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin = os.fdopen(0)  # what has been read of the old one is not ours


if __name__ == "__main__":
    main()
