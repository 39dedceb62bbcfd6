"""Reads of a composed config that several rooms need."""

import pickle
from typing import Any

from omegaconf import DictConfig, OmegaConf

from stagesweep.config import schema


def hardware(cfg: DictConfig) -> schema.Hardware:
    """The hardware profile."""
    settings = OmegaConf.to_object(cfg.hardware)
    assert isinstance(settings, schema.Hardware)
    return settings


def copied(cfg: DictConfig) -> DictConfig:
    """A copy of a whole config, in half the time of a deep one."""
    copy: DictConfig = pickle.loads(pickle.dumps(cfg, pickle.HIGHEST_PROTOCOL))
    return copy


def has_parts(model: Any) -> bool:
    """Whether a model is several, ``model.<part>`` each, of which a stage names the one it uses."""
    return isinstance(model, DictConfig) and "_target_" not in model


def targets(value: Any) -> set[str]:
    """Every ``_target_`` in nested plain values."""
    if isinstance(value, dict):
        own = {value["_target_"]} if isinstance(value.get("_target_"), str) else set()
        return own.union(*(targets(v) for v in value.values()))
    return set().union(*(targets(v) for v in value)) if isinstance(value, list | tuple) else set()
