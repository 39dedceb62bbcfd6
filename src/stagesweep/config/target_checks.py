"""Checks the nodes of a config against the classes that they name."""

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from stagesweep.base.errors import UserError
from stagesweep.config import schema
from stagesweep.config.messages import nearest
from stagesweep.config.nodes import has_parts, target_nodes
from stagesweep.config.signatures import bind, locate


def check_targets(cfg: DictConfig) -> None:
    """Bind every ``_target_`` node without a schema to the signature of its target."""
    models = {f"model.{part!s}" for part in cfg.model} if has_parts(cfg.model) else {"model"}
    for path, node in target_nodes(OmegaConf.to_container(cfg)):
        if not is_dataclass(OmegaConf.get_type(OmegaConf.select(cfg, path))):
            bind(path, node, supplied=("spec",) if path in models else ())
        else:
            locate(path, node["_target_"])
            if path.endswith(".optimizer"):
                _check_optimizer(path, node)


def _check_optimizer(path: str, node: dict[str, Any]) -> None:
    from torch.optim import Optimizer

    target = locate(path, node["_target_"])
    if not (isinstance(target, type) and issubclass(target, Optimizer)):
        raise UserError(f"{path}._target_: '{node['_target_']}' is not a torch optimizer")


def load_stages(cfg: DictConfig) -> dict[str, Any]:
    """The stages by name, in order: their settings if they have a schema, else plain values."""
    if not cfg.stage:
        raise UserError("a run needs at least one stage; choose an experiment or add +stage@…")
    stages: dict[str, Any] = {}
    for name, node in cfg.stage.items():
        path = f"stage.{name}"
        if not isinstance(node, DictConfig) or "_target_" not in node:
            raise UserError(f"{path} is not a stage; add one with '+stage@{path}=<kind>'")
        target = locate(path, node._target_)
        stages[str(name)] = settings = OmegaConf.to_object(node)
        if isinstance(settings, schema.Stage) and not (
            isinstance(target, type) and issubclass(target, type(settings))
        ):
            kind = type(settings).__name__
            raise UserError(f"{path}._target_: '{node._target_}' does not inherit config.{kind}")
    _check_parts(cfg)
    return stages


def _check_parts(cfg: DictConfig) -> None:
    """Check that stages name a part of the model if, and only if, the model has parts."""
    known = [str(part) for part in cfg.model] if has_parts(cfg.model) else []
    for path, node in _nodes_with_part(cfg.stage, "stage"):
        if node.part is None and known:
            raise UserError(
                f"{path}.part: the model has parts; set it to one of {', '.join(known)}"
            )
        if node.part is not None and node.part not in known:
            hint = nearest(node.part, known) if known else "the model has no parts; leave it null"
            raise UserError(f"{path}.part={node.part}: no such part of the model; {hint}")


def _nodes_with_part(node: Any, path: str) -> Iterator[tuple[str, DictConfig]]:
    """Every node with a key ``part``, by dotted path."""
    if isinstance(node, DictConfig):
        if "part" in node:
            yield path, node
        for key in node:
            yield from _nodes_with_part(node[key], f"{path}.{key!s}")
