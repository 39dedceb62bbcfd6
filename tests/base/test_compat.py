"""Private names of torch: a failure here says what upstream has changed."""

import inspect
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch.distributed as dist

from stagesweep.base import compat


def test_compat_imports_nothing_heavy(needs_torch: Callable[[str], bool]) -> None:
    assert not needs_torch("import stagesweep.base.compat")


def test_optimizer_imports() -> None:
    # Optimizer.add_param_group and step are wrapped by torch._disable_dynamo, which imports it.
    wrapper = inspect.getsource(import_module("torch._compile"))
    assert f"import {compat.OPTIMIZER_IMPORTS}" in wrapper, (
        f"torch._compile no longer imports {compat.OPTIMIZER_IMPORTS} when an optimizer is built; "
        "OPTIMIZER_IMPORTS must name what it imports instead"
    )
    assert find_spec(compat.OPTIMIZER_IMPORTS) is not None


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's own")
def test_die_with_parent() -> None:
    read, write = os.pipe()
    parent = os.fork()
    if not parent:
        if not os.fork():
            compat.die_with_parent(signal.SIGKILL)
            os.write(write, str(os.getpid()).encode())
            time.sleep(60)
        time.sleep(60)
        os._exit(0)
    child = int(os.read(read, 20))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    until = time.monotonic() + 30
    while _alive(child):
        assert time.monotonic() < until, (
            "torch.multiprocessing._prctl_pr_set_pdeathsig no longer ends a process with its parent"
        )
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_default_store() -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=9))
    try:
        compat.default_store().set("key", "value")
        assert compat.default_store().get("key") == b"value", (
            "torch.distributed.distributed_c10d._get_default_store no longer returns the store of "
            "the default process group"
        )
    finally:
        dist.destroy_process_group()
