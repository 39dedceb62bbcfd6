"""Random and damaged inputs for half a minute; `make fuzz` goes on for longer."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_every_answer_is_correct_work_or_one_line(tmp_path: Path) -> None:
    # In a process of its own: it limits its memory, and forks.
    process = subprocess.run(
        [sys.executable, "-m", "fuzz", "--seconds=30", "--seed=0"],
        env=os.environ | {"PYTHONPATH": str(HERE), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert " inputs, 0 faults" in process.stdout
