"""Builds objects from config nodes, and loads weights to start from."""

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
from stagesweep.config.signatures import locate_all
from stagesweep.core import checkpoint

# Fields of the schemas that hold `_target_` nodes.
TARGET_FIELDS = ("sampler", "augment", "metrics", "voted", "baselines")


def build(path: str, node: Any, **arguments: Any) -> Any:
    """Instantiate the node at a dotted path of the config, with these arguments added.

    The node is made plain first: Hydra would copy the whole config around a DictConfig.
    """
    plain = OmegaConf.to_container(node, resolve=True)
    locate_all(path, plain)
    built = instantiate(plain, **arguments, _convert_="all")
    check_built(path, plain, built)
    return built


def check_built(path: str, node: Any, built: Any) -> None:
    """Raise UserError if a target returned an object of another kind than its key expects."""
    key = path.partition(".")[0]
    name = node.get("_target_", "") if isinstance(node, Mapping) else ""
    if key == "data":
        right, wanted = (
            hasattr(built, "spec") and hasattr(built, "split"),
            "data with spec and split",
        )
    elif key in ("model", "loss"):
        right, wanted = isinstance(built, nn.Module), "a torch module"
    else:
        right, wanted = callable(built), f"a {path.rpartition('.')[2]} that can be called"
        if key == "stage" and path.count(".") == 1:
            wanted = "a stage that can be called"
    if not right:
        kind = type(built).__name__
        found = "None" if built is None else f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
        raise UserError(f"{path}._target_: '{name}' returns {found}, not {wanted}")


def build_stage(name: str, node: DictConfig) -> Any:
    """Build a stage. Of one with a schema, only the target fields are instantiated."""
    if not issubclass(OmegaConf.get_type(node) or object, schema.Stage):
        return build(f"stage.{name}", node)
    settings: Any = OmegaConf.to_object(node)
    locate_all(f"stage.{name}", OmegaConf.to_container(node, resolve=True))
    _build_targets(f"stage.{name}", settings)
    return get_class(settings._target_)(**vars(settings))


def _build_targets(path: str, settings: schema.Stage) -> None:
    """Instantiate the target fields of the settings, and of fits among its fields, in place."""
    for field in fields(settings):
        value, place = getattr(settings, field.name), f"{path}.{field.name}"
        if isinstance(value, schema.Stage):
            _build_targets(place, value)
        elif field.name in TARGET_FIELDS and value:
            built = instantiate(value, _convert_="all")
            setattr(settings, field.name, built)
            if field.name in ("sampler", "augment"):
                check_built(place, value, built)
            elif isinstance(built, Mapping):
                for name, each in built.items():
                    if each is None or isinstance(each, str | int | float | list | dict):
                        check_built(f"{place}.{name}", value[name], None)


def part_weights(state: Mapping[str, Any], part: str | None) -> dict[str, Any]:
    """The weights of one part of the model, by their names in that part; None: all weights."""
    prefix = "" if part is None else f"{part}."
    return {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}


def fitting_weights(model: nn.Module, path: Path, part: str | None) -> dict[str, Any]:
    """The tensors of a checkpoint that have the name and shape of one of the model.

    Empty if the checkpoint has nothing of this part of the model; UserError when nothing fits.
    """
    state = part_weights(checkpoint.load(path)["model"], part)
    own = model.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    if not fitting and (state or part is None):
        raise UserError(f"init_from={path} fits no parameter of this model; compare model=")
    return fitting


def init_from(model: nn.Module, path: Path, log: logging.Logger, part: str | None = None) -> None:
    """Load every parameter of the same name and shape from the checkpoint of another run.

    Logs which parameters keep their initial values; UserError when nothing fits. A part of the
    model that the checkpoint does not have keeps all of them.
    """
    own = model.state_dict()
    fitting = fitting_weights(model, path, part)
    if not fitting:
        log.warning("init_from: %s has no weights of model.%s, left as initialised", path, part)
        return
    model.load_state_dict(fitting, strict=False)
    missing = sorted(set(own) - set(fitting))
    log.info("init_from: %d of %d tensors from %s", len(fitting), len(own), path)
    if missing:
        names = ", ".join(missing)
        log.warning("init_from: not in that checkpoint, left as initialised: %s", names)
