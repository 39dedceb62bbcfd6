"""A stage that sleeps and returns a number, to measure the overhead around it."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagesweep.base import trial
from stagesweep.base.errors import Pruned


@dataclass
class Toy:
    """Returns a score, mainly ``x``, after ``seconds`` of sleep; reports ``steps`` values.

    Each call writes a file in the folder ``log`` with its begin and end.
    """

    log: str
    x: float = 0.0
    y: float = 0.0
    z: float = 0.0
    seconds: float = 0.0
    steps: int = 0

    def metric_names(self) -> tuple[str, ...]:
        return ("score",)

    def __call__(self, run: Any) -> dict[str, float]:
        began = time.time()
        score = self.x + self.y / 10 + self.z / 100
        for step in range(1, self.steps + 1):
            time.sleep(self.seconds / self.steps)
            trial.current().report("toy", {"score": score * step}, step)
            if trial.current().should_stop():
                raise Pruned(f"pruned at {step}")
        if not self.steps:
            time.sleep(self.seconds)
        # Each attempt after a kill runs in its own process.
        Path(self.log, f"{os.getpid()}_{began}").write_text(f"{began} {time.time()} {run.folder}")
        return {"score": score}
