"""The fixtures of `fits`, and scripts that start processes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fits import bench, make_batch, make_term, open_bench, tiny  # noqa: F401


@pytest.fixture(scope="module")
def left_by(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Run a script of this folder that starts processes; returns the folder of their results."""

    def run(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        process = subprocess.run(
            [sys.executable, str(Path(__file__).with_name(f"{name}.py")), str(folder)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
            timeout=300,
            check=False,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return folder

    return run
