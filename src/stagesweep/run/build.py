"""From config to objects: what a node describes, and weights to begin with."""

import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from stagesweep.base.errors import UserError
from stagesweep.config import schema
from stagesweep.core import checkpoint


def built(node: Any, **given: Any) -> Any:
    """What a node describes. Of a node that is not plain, Hydra would copy the config around it."""
    return instantiate(OmegaConf.to_container(node, resolve=True), **given, _convert_="all")


def build_stage(node: DictConfig) -> Any:
    """The stage a node describes: its schema gives plain values, open fields are instantiated."""
    if not issubclass(OmegaConf.get_type(node) or object, schema.Stage):
        return built(node)
    settings: Any = OmegaConf.to_object(node)
    return get_class(settings._target_)(**vars(opened(settings)))


# Fields of the schemas that hold `_target_` nodes.
OPEN = ("sampler", "augment", "metrics", "voted", "baselines")


def opened(settings: schema.Stage) -> schema.Stage:
    """The same settings, with what their open fields describe, and those of a fit among them."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, schema.Stage):
            opened(value)
        elif field.name in OPEN and value:
            setattr(settings, field.name, instantiate(value, _convert_="all"))
    return settings


def of_part(state: Mapping[str, Any], part: str | None) -> dict[str, Any]:
    """The weights of a part of the model, under its own names; all of them for None."""
    prefix = "" if part is None else f"{part}."
    return {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}


def init_from(model: nn.Module, path: Path, log: logging.Logger, part: str | None = None) -> None:
    """Start from another run's checkpoint: every parameter of the same name and shape.

    Says how many it left as they were; UserError when none fits. Of a model of parts, one that the
    checkpoint does not have is left as it is.
    """
    state = of_part(checkpoint.load(path)["model"], part)
    if part is not None and not state:
        log.warning("init_from: %s has nothing of model.%s, left as initialised", path, part)
        return
    own = model.state_dict()
    fits = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    if not fits:
        raise UserError(f"init_from={path} fits no parameter of this model; compare model=")
    model.load_state_dict(fits, strict=False)
    left = sorted(set(own) - set(fits))
    log.info("init_from: %d of %d tensors from %s", len(fits), len(own), path)
    if left:
        log.warning("init_from: not in that checkpoint, left as initialised: %s", ", ".join(left))
