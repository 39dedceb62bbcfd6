"""The fork server on a machine with a GPU, simulated by a device file and a mocked torch.cuda."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from stagesweep.hardware import detection
from stagesweep.sweep.engine import slots

# Calls that initialise CUDA on torch 2.11 with CUDA 13; `is_available` does so without NVML.
INITIALISE = (
    "is_bf16_supported",
    "get_device_properties",
    "get_device_name",
    "get_device_capability",
    "mem_get_info",
    "current_device",
)
Answer = tuple[list[str], str | None]


def begin_server(pipe: "Connection[Any, Any]", devices: Path, modules: list[str]) -> None:
    """Warm up as the server does, in another process; send the package that initialised CUDA."""
    initialised: list[str] = []

    def initialise(name: str) -> Callable[..., Any]:
        def act(*_: Any, **__: Any) -> Any:
            if name == "is_available" and os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK") == "1":
                return True
            if name != "_lazy_init":
                torch.cuda.init()  # type: ignore[no-untyped-call]
            initialised.append(name)
            return True

        return act

    detection.Path = lambda _: devices  # type: ignore[attr-defined,assignment]
    for name in (*INITIALISE, "is_available", "_lazy_init"):
        setattr(torch.cuda, name, initialise(name))
    torch.cuda.is_initialized = lambda: bool(initialised)
    torch.cuda.device_count = lambda: 1
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    assert detection.has_gpu_driver()
    for name in (slots.GUARD, slots.SERVER):  # another test may have imported them
        sys.modules.pop(name, None)
    for name in (slots.GUARD, *modules, slots.SERVER):
        __import__(name)
    pipe.send((initialised, slots.cuda_initialised_by()))


def server(tmp_path: Path, *modules: str) -> Answer:
    (tmp_path / "nvidia0").touch()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=begin_server, args=(sender, tmp_path, list(modules)))
    process.start()
    sender.close()
    answer: Answer = receiver.recv()
    process.join()
    return answer


def test_the_fork_server_never_initialises_cuda(tmp_path: Path) -> None:
    fit = ["sklearn", "stagesweep.stage.fit", "stagesweep.cli"]  # with them it rehearses
    assert server(tmp_path, *fit) == ([], None)


@pytest.mark.parametrize(
    ("line", "culprit"),
    [
        ("torch.cuda.init()", "eager_package"),
        ("torch.cuda.is_available(), torch.cuda.device_count()", None),
    ],
)
def test_a_package_that_initialises_cuda_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, culprit: str | None
) -> None:
    package = tmp_path / "eager_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "gpu.py").write_text(f"import torch\n{line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert server(tmp_path, "eager_package.gpu")[1] == culprit
