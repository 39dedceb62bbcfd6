"""Runs the command in processes forked from this one, which has imported what it may need.

A line of JSON on stdin asks for one, its process id on stdout is the answer; its exit status is
left in a file. A new interpreter takes seconds more, which is most of what a small run takes.
"""

import gc
import json
import os
import pkgutil
import runpy
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

# What looks at the environment or changes the process when it is imported.
EACH = ("stagesweep.__main__", "stagesweep.cli", "stagesweep.sweep.warm")


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
    runpy.run_module("stagesweep", run_name="__main__", alter_sys=True)


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
