"""What a sweep leaves behind: its folder, and the summary of its trials."""

from pathlib import Path
from typing import Any

import optuna
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, read_write


class Results(Callback):
    """Prepares the folder of a sweep, and sums its trials up at the end."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with read_write(config):
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir={folder}")
