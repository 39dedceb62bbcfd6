"""The benchmark of several processes runs."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_smoke_run_times_all_three() -> None:
    words = [sys.executable, "-m", "benchmarks.processes", "--processes", "2", "--small"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^  (.+?) +([\d.]+) ms +([\d.]+) x DDP$", done.stdout, re.MULTILINE)
    assert [name for name, *_ in found] == ["torch DDP", "ours", "no exchange"]
    assert found[0][2] == "1.00"
