"""Registers every schema with Hydra, and the resolvers that the YAML uses."""

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from stagesweep.config import options
from stagesweep.config.schema import (
    Baselines,
    ChooseClusters,
    Config,
    CrossValidate,
    Evaluate,
    Figures,
    Fit,
    Hardware,
    InitClusters,
)


def folder() -> Path:
    """Where the YAML lives: inside an installed package, or else at the root of the checkout."""
    packaged = Path(__file__).parents[1] / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "conf"


# What may change from one start of a sweep to the next.
OPEN = ("n_trials", "study", "budget", "timeout", "max_retries", "max_failure_rate")


def study_of(method: str, overrides: Sequence[str]) -> str:
    """The name of the sweep that a command asks for: the same for the same command.

    How long it goes on, and how it uses the machine, are not part of the name.
    """
    left_out = ("hydra.", "hydra/", "sweep.", "hardware.", *(f"search.{key}=" for key in OPEN))
    said = sorted(
        each for each in map(str, overrides) if not each.lstrip("+~").startswith(left_out)
    )
    digest = hashlib.sha256("\0".join(sorted(said)).encode()).hexdigest()
    return f"{method}_{digest[:8]}"


def register() -> None:
    """Put every schema into Hydra's ConfigStore, and the resolvers that the YAML uses."""
    OmegaConf.register_resolver("host", lambda: platform.node().split(".")[0], replace=True)
    OmegaConf.register_resolver("study_of", study_of, replace=True)
    OmegaConf.register_resolver("list_groups", options.groups, replace=True)
    OmegaConf.register_resolver("list_experiments", options.experiments, replace=True)
    store = ConfigStore.instance()
    store.store(name="base_config", node=Config, replace=True)
    store.store(group="hardware", name="base_hardware", node=Hardware, replace=True)
    for name, node in {
        "fit": Fit,
        "choose_clusters": ChooseClusters,
        "init_clusters": InitClusters,
        "baselines": Baselines,
        "evaluate": Evaluate,
        "cross_validate": CrossValidate,
        "figures": Figures,
    }.items():
        store.store(group="stage", name=f"base_{name}", node=node, replace=True)
