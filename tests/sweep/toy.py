"""A stage whose behaviour is set by its config, to test the engine. Runs in trials only."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagesweep.base import trial


class Nothing:
    """A model or data set that is never used."""


@dataclass
class Toy:
    """Returns the score ``x`` and the cost ``y`` after some seconds, or fails as ``act`` says.

    Each call writes a file in the folder ``log``: its times and its slot.
    """

    log: str
    x: float = 0.0
    y: float = 0.0
    act: str = "well"
    seconds: float = 0.0
    steps: int = 0
    pause: float = 0.0

    def metric_names(self) -> tuple[str, ...]:
        return ("score", "cost")

    def __call__(self, run: Any) -> dict[str, float]:
        began = time.time()
        left = Path(self.log, f"{os.getpid()}")
        first = not Path(self.log, self.act).exists()
        if self.act == "raises":
            raise ValueError("as it was told")
        if self.act == "kill" or (self.act == "kill_once" and first):
            Path(self.log, self.act).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        number, _, cause = self.act.partition(":")
        if number.isdigit() and Path(self.log, cause).exists():
            raise OSError(int(number), os.strerror(int(number)), "file")
        if self.act == "mendable" and Path(self.log, "broken").exists():
            raise RuntimeError("the first line\nthe second line")
        if self.act == "hangs":
            time.sleep(500)
        for step in range(1, self.steps + 1):
            trial.current().report("toy", {"score": self.x * step}, step)
            time.sleep(self.pause)
            if trial.current().should_stop():
                from stagesweep.base.errors import Pruned

                raise Pruned(f"pruned at {step}")
        time.sleep(self.seconds)
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        left.write_text(f"{began} {time.time()} {run.folder} {gpus}")
        score = float("nan") if self.act == "no_number" else self.x + run.cfg.seed
        return {"score": score, "cost": self.y}
