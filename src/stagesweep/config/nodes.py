"""Reads nodes of a composed config."""

import pickle
from collections.abc import Iterator, Sequence
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf

from stagesweep.config import schema

Node = dict[str, Any]


def hardware_settings(cfg: DictConfig) -> schema.Hardware:
    """The hardware profile as an object of its schema."""
    settings = OmegaConf.to_object(cfg.hardware)
    assert isinstance(settings, schema.Hardware)
    return settings


def copy_config(cfg: DictConfig) -> DictConfig:
    """Copy a whole config, in half the time of ``copy.deepcopy``."""
    copy: DictConfig = pickle.loads(pickle.dumps(cfg, pickle.HIGHEST_PROTOCOL))
    return copy


def as_typed(overrides: Sequence[str]) -> list[str]:
    """Overrides as their texts were typed. A node would resolve the interpolations in a text."""
    if isinstance(overrides, ListConfig):
        overrides = cast("list[str]", OmegaConf.to_container(overrides, resolve=False))
    return [str(each) for each in overrides]


def has_parts(model: Any) -> bool:
    """Whether the model node holds several models, ``model.<part>``, of which a stage uses one."""
    return isinstance(model, DictConfig) and "_target_" not in model


def target_nodes(value: Any, path: str = "") -> Iterator[tuple[str, Node]]:
    """Every node with a ``_target_`` in nested plain values, outermost first, by dotted path."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield path, value
        for key, child in value.items():
            yield from target_nodes(child, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for number, child in enumerate(value):
            yield from target_nodes(child, f"{path}[{number}]")


def target_names(value: Any) -> set[str]:
    """Every ``_target_`` that is text in nested plain values, tuples included."""
    if isinstance(value, dict):
        own = {value["_target_"]} if isinstance(value.get("_target_"), str) else set()
        return own.union(*(target_names(v) for v in value.values()))
    if isinstance(value, list | tuple):
        return set().union(*(target_names(v) for v in value))
    return set()
