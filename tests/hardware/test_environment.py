import os
import subprocess
from collections.abc import Callable

import pytest

from stagesweep.config.schema import Hardware
from stagesweep.hardware.environment import set_variables

Command = Callable[..., "subprocess.CompletedProcess[str]"]

NAMES = ("OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "before")


def test_variables_that_the_profile_leaves_open_are_unchanged() -> None:
    set_variables(Hardware())
    assert [os.environ[name] for name in NAMES] == ["before"] * 3


def test_variables_of_the_profile_are_set() -> None:
    set_variables(Hardware(threads=3, allocator="expandable_segments:True"))
    assert [os.environ[name] for name in NAMES] == ["3", *["expandable_segments:True"] * 2]


def test_variables_are_set_before_torch_is_imported(needs_torch: Callable[[str], bool]) -> None:
    assert not needs_torch(
        "from stagesweep import cli\n"
        "from stagesweep.config.schema import Hardware\n"
        "cli.environment.set_variables(Hardware(threads=1))"
    )


def test_the_command_sets_variables_before_it_imports_torch(cold: Command) -> None:
    """Half of the threads that torch found when it started are loader processes."""
    fit = ["~stage.init_clusters", "~stage.joint", "~stage.evaluate", "stage.pretrain.epochs=1"]
    said = cold(
        "experiment=tiny",
        "hardware.device=cpu",
        "hardware.threads=1",
        "objective.metric=pretrain/val_loss",
        *fit,
        OMP_NUM_THREADS="2",
    )
    assert "threads 1, loader workers 0" in said.stdout + said.stderr
