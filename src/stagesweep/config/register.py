"""Registers the schemas with Hydra, and the resolvers that the YAML files use."""

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from stagesweep.config import options
from stagesweep.config.nodes import as_typed
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
    """The folder of the YAML files: in the installed package, or else in the checkout."""
    packaged = Path(__file__).parents[1] / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "conf"


# Keys of `search` that may change between two starts of a sweep.
CHANGEABLE = (
    "n_trials",
    "study",
    "budget",
    "timeout",
    "max_retries",
    "max_failure_rate",
    "max_failures_in_a_row",
    "retry_failed",
)


def study_name(method: str, overrides: Sequence[str]) -> str:
    """Name the study of a command: the same command gets the same name.

    Overrides of its length, and of how it uses the machine, do not change the name. The texts count
    as they were typed: what an interpolation gives may differ from trial to trial.
    """
    search = (f"search.{key}=" for key in CHANGEABLE)
    left_out = ("hydra.", "hydra/", "sweep.", "hardware.", *search)
    kept = sorted(o for o in as_typed(overrides) if not o.lstrip("+~").startswith(left_out))
    digest = hashlib.sha256("\0".join(kept).encode()).hexdigest()
    return f"{method}_{digest[:8]}"


def register() -> None:
    """Register the schemas in Hydra's ConfigStore, and the resolvers in OmegaConf."""
    OmegaConf.register_resolver("host", lambda: platform.node().split(".")[0], replace=True)
    OmegaConf.register_resolver("study_of", study_name, replace=True)
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
