"""What all tests share: real data where there is some, the real command, composed configs."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from stagesweep import config
from stagesweep.core.seeding import seed_everything

# A shell that starts a job in the background has it ignore Ctrl-C, and all processes it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = Path(__file__).parent
Command = Callable[..., "subprocess.CompletedProcess[str]"]
Compose = Callable[..., DictConfig]


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Every test draws the same numbers, whatever ran before it in its process."""
    seed_everything(0)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data; tests that need it are skipped, by name, without it."""
    folder = os.environ.get("STAGESWEEP_TEST_DATA")
    if not folder:
        pytest.skip("needs real data: set STAGESWEEP_TEST_DATA to its folder")
    return Path(folder)


@pytest.fixture
def stagesweep(tmp_path: Path) -> Command:
    """Run the real command in a process: `stagesweep("seed=1", …)`.

    It works in tmp_path, with a store of its own, and also finds the experiments in tests/conf.
    `env` adds to the environment; `status` is the exit status that is expected (None: any).
    """

    def run(
        *arguments: str, status: int | None = 0, timeout: float = 300, **env: str
    ) -> "subprocess.CompletedProcess[str]":
        process = subprocess.run(
            [sys.executable, "-m", "stagesweep", f"--config-dir={HERE / 'conf'}", *arguments],
            cwd=tmp_path,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "STAGESWEEP_STORE": str(tmp_path / "store")}
            | env,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if status is not None:
            assert process.returncode == status, process.stdout + process.stderr
        return process

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
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
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def needs_torch() -> Callable[[str], bool]:
    """Whether a fresh interpreter that runs this code imports torch."""

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
    config.register()

    def composed(*overrides: str, folders: Sequence[Path] = ()) -> DictConfig:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(config.folder())):
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
