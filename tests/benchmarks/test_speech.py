"""The benchmark of the mixture of experts runs."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_smoke_run_compares_what_it_says() -> None:
    words = [sys.executable, "-m", "benchmarks.speech", "routed", "--small"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "all 8 experts" in done.stdout
    assert "2 of 8 experts" in done.stdout
