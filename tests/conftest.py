"""Fixtures of all tests: real data, the real command, composed configs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from stagesweep.base.seeding import seed_everything
from stagesweep.config import register

# A background job of a shell ignores Ctrl-C, and so do the processes that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = Path(__file__).parent
Command = Callable[..., "subprocess.CompletedProcess[str]"]
Compose = Callable[..., DictConfig]


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all tests but those marked gpu, and from the processes that they start.

    Other tests expect results of the CPU, and their processes cannot share a GPU.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Seed every test, so that the order of tests does not matter."""
    seed_everything(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data; tests that use it are skipped without it."""
    folder = os.environ.get("STAGESWEEP_TEST_DATA")
    if not folder:
        pytest.skip("needs real data: set STAGESWEEP_TEST_DATA to its folder")
    return Path(folder)


class Process:
    """A command that was started, with methods as in subprocess.Popen."""

    def __init__(self, arguments: Sequence[str], pid: int, files: Mapping[str, str]) -> None:
        self.args, self.pid = list(arguments), pid
        self.files = {name: Path(file) for name, file in files.items()}
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        if self.returncode is None and self.files["status"].exists():
            self.returncode = int(self.files["status"].read_text())
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for the exit status; after the timeout, kill it and raise TimeoutExpired."""
        until = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                with suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.args, timeout, *self.output())
            time.sleep(0.01)
        return status

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for its end; return stdout and stderr."""
        self.wait(timeout)
        return self.output()

    def output(self) -> tuple[str, str]:
        """Its stdout and stderr so far."""
        return self.files["stdout"].read_text(), self.files["stderr"].read_text()

    def send_signal(self, signum: int) -> None:
        """Send a signal, unless it has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Warm:
    """Runs the command in forked processes: see warm.py."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.server = subprocess.Popen(
            [sys.executable, str(HERE / "warm.py")],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> Process:
        """Start the command in a folder; ``environment`` is added to that of the tests."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.count += 1
        names = ("stdout", "stderr", "status")
        files = {name: str(self.folder / f"{self.count}.{name}") for name in names}
        asked = {
            "arguments": list(arguments),
            "folder": str(folder),
            "environment": {**os.environ, "OMP_NUM_THREADS": "1", **environment},
            "files": [files["stdout"], files["stderr"]],
            "status": files["status"],
        }
        self.server.stdin.write(json.dumps(asked) + "\n")
        self.server.stdin.flush()
        return Process(arguments, int(self.server.stdout.readline()), files)

    def run(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        timeout: float = 300,
    ) -> "subprocess.CompletedProcess[str]":
        """Run the command to its end."""
        process = self.start(arguments, folder, environment)
        status = process.wait(timeout)
        return subprocess.CompletedProcess(process.args, status, *process.output())


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """The command, without the seconds that its imports take; see warm.py."""
    warm = Warm(tmp_path_factory.mktemp("warm"))
    yield warm
    warm.server.communicate()  # it ends with its stdin


Start = Callable[[Sequence[str], Path, dict[str, str], float], "subprocess.CompletedProcess[str]"]


def command(folder: Path, start: Start) -> Command:
    """Run the real command in a folder, with a store of its own."""

    def run(
        *arguments: str, status: int | None = 0, timeout: float = 300, **env: str
    ) -> "subprocess.CompletedProcess[str]":
        given = (f"--config-dir={HERE / 'conf'}", *arguments)
        own = {"STAGESWEEP_STORE": str(folder / "store"), **env}
        process = start(given, folder, own, timeout)
        if status is not None:
            assert process.returncode == status, process.stdout + process.stderr
        return process

    return run


@pytest.fixture
def stagesweep(tmp_path: Path, warm: Warm) -> Command:
    """Run the real command: `stagesweep("seed=1", …)`, in a process forked from a warm one.

    It works in tmp_path, with a store of its own, and also finds the experiments in tests/conf.
    `env` adds to the environment; `status` is the exit status that is expected (None: any).
    """
    return command(tmp_path, warm.run)


@pytest.fixture
def cold(tmp_path: Path) -> Command:
    """As `stagesweep`, but in a new interpreter, as a user starts it."""

    def start(
        arguments: Sequence[str], folder: Path, environment: dict[str, str], timeout: float
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "stagesweep", *arguments],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return command(tmp_path, start)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The folder of a file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a small disk cannot be mounted here (needs root)")
    yield disk
    # Lazy: the fork server of a sweep may not have ended yet.
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def needs_torch() -> Callable[[str], bool]:
    """Whether a new interpreter that runs this code imports torch."""

    def run(code: str) -> bool:
        lines = f"import sys\n{code}\nprint('torch' in sys.modules)"
        process = subprocess.run(
            [sys.executable, "-c", lines], capture_output=True, text=True, check=True
        )
        return process.stdout.split()[-1] == "True"

    return run


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    """Compose a config in this process, as the command would: `compose("seed=1", …)`.

    It also finds the experiments in tests/conf and in `folders`. Hydra's own node is set as in a
    run, and taken out of what is returned.
    """
    register.register()

    def composed(*overrides: str, folders: Sequence[Path] = ()) -> DictConfig:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(register.folder())):
            found = ",".join(folder.as_uri() for folder in (HERE / "conf", *folders))
            path = f"hydra.searchpath=[{found}]"
            cfg = hydra_compose("config", [path, *overrides], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        return cfg

    yield composed
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
