"""The `stagesweep` command. Imports no torch: help and completion answer at once."""

import hydra
from omegaconf import DictConfig

from stagesweep import config

config.register()


@hydra.main(
    config_path=str(config.folder()), config_name="config", execution_whitelist=config.trusted()
)
def job(cfg: DictConfig) -> float | None:
    from stagesweep.run import run

    return run(cfg)


def main() -> None:
    job()
