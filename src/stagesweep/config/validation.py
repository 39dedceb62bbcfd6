"""Checks a composed config before anything is allocated."""

from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.utils import execution_whitelist
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stagesweep.base.errors import MissingFile, UserError
from stagesweep.config import schema, stage_checks, target_checks, trust
from stagesweep.config.bounds import check_bounds
from stagesweep.config.messages import explain, nearest
from stagesweep.config.nodes import copy_config


def validate(cfg: DictConfig) -> None:
    """Raise UserError for the first fault found; it names the key and the remedy."""
    validate_targets(validate_structure(cfg))


def validate_structure(cfg: DictConfig) -> DictConfig:
    """Check keys, bounds and files, without importing what the config names.

    Returns a copy of the config with every interpolation resolved.
    """
    resolved = resolve(cfg)
    check_schema(resolved)
    check_sharding(resolved.hardware)
    check_files(resolved)
    return resolved


def validate_targets(resolved: DictConfig) -> None:
    """Check a config that `validate_structure` has returned against the code that it names."""
    with execution_whitelist(trust.trusted()):
        target_checks.check_targets(resolved)
        stages = target_checks.load_stages(resolved)
        stage_checks.check_stages(resolved, stages)


def resolve(cfg: DictConfig) -> DictConfig:
    """Copy a config and resolve its interpolations; UserError for a missing value."""
    resolved = copy_config(cfg)
    OmegaConf.set_readonly(resolved, False)
    try:
        OmegaConf.resolve(resolved)
        check_missing(resolved)  # takes a third of the time once interpolations are resolved
    except OmegaConfBaseException as error:
        with suppress(OmegaConfBaseException):
            check_missing(cfg)
        raise UserError(explain(error) or str(error)) from error
    return resolved


def check_missing(cfg: DictConfig) -> None:
    """Raise UserError for a mandatory key without a value."""
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise UserError(f"{missing[0]} is not set; give it a value: {missing[0]}=<value>")


def check_schema(node: DictConfig, path: str = "") -> None:
    """Check the keys and the bounds of every node that has a schema.

    OmegaConf checks types itself, but lets ``+key=value`` add any key.
    """
    kind = OmegaConf.get_type(node)
    known = {f.name: f.metadata for f in fields(kind)} if is_dataclass(kind) else None
    for key in node:
        value, name = node[key], f"{path}.{key!s}".lstrip(".")
        if known is not None and key not in known:
            raise UserError(f"unknown key '{name}': {nearest(str(key), known)}")
        if isinstance(value, DictConfig):
            check_schema(value, name)
        if known:
            check_bounds(name, value, known[str(key)])


def check_sharding(hardware: Any) -> None:
    """Check that the profile has no setting that a sharded model does not support."""
    if hardware.parallel is not schema.Parallel.shard:
        return
    if hardware.micro_batch == schema.AUTO:
        raise UserError(
            "hardware.micro_batch=auto finds what fits by running out of memory, which processes "
            "of hardware.parallel=shard cannot do alone; set it to a number"
        )
    if hardware.compile:
        raise UserError(
            "hardware.compile=true does not work with hardware.parallel=shard; set only one of them"
        )


def check_files(cfg: DictConfig) -> None:
    """Check that the files a run reads exist."""
    for key in ("data.path", "init_from"):
        path = OmegaConf.select(cfg, key)
        if isinstance(path, str) and not Path(path).exists():
            raise MissingFile(
                f"{key}={path}: no such file or folder (looked from {Path.cwd()})", str(path)
            )
