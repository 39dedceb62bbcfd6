"""Composes the config of each run of a sweep, in a hundredth of the time that Hydra takes.

Most runs of a sweep differ in values only. Hydra would read and merge every file again for each of
them. Instead, the values are set in a config that Hydra has composed for another run.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.utils import setup_globals
from hydra.types import HydraContext
from omegaconf import Container, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from stagesweep.config.nodes import as_typed


@dataclass(frozen=True)
class SweepContext:
    """The context that all runs of a sweep share. It is pickled and sent to their processes.

    ``master`` is the pickled config of the sweep, ``task`` names the function to call, and
    ``folder`` is the sweep's. ``like`` is the composed config of one of the runs.
    """

    context: HydraContext
    master: bytes
    task: tuple[str, str]
    folder: Path
    like: DictConfig | None = None


def sweep_context(context: HydraContext, master: DictConfig, task: tuple[str, str]) -> SweepContext:
    """The context of the sweep in the folder of ``master``."""
    return SweepContext(context, pickle.dumps(master), task, Path(master.hydra.sweep.dir))


def with_example(
    context: HydraContext, master: DictConfig, task: tuple[str, str], overrides: Sequence[str]
) -> bytes:
    """The pickled context of a sweep, with the config of the run that has these overrides."""
    setup_globals()
    example = compose_with_hydra(context, master, overrides)
    return pickle.dumps(replace(sweep_context(context, master, task), like=example))


def compose(work: SweepContext, overrides: Sequence[str]) -> DictConfig:
    """Compose the config with these overrides. This may change and return ``work.like``."""
    if work.like is not None and (values := differences(work.like, overrides)) is not None:
        try:
            for key, value in values.items():
                OmegaConf.update(work.like, key, value, merge=True)
            work.like.hydra.overrides.task = list(overrides)
            return work.like
        except OmegaConfBaseException:
            pass  # Hydra has the better message for a wrong value
    return compose_with_hydra(work.context, pickle.loads(work.master), overrides)


def compose_with_hydra(
    context: HydraContext, master: DictConfig, overrides: Sequence[str]
) -> DictConfig:
    """Compose a config with Hydra, in the folder and the study of the sweep."""
    made: DictConfig = context.config_loader.load_sweep_config(master, list(overrides))
    with open_dict(made):
        made.hydra.sweep.dir = master.hydra.sweep.dir
        made.search.study = master.search.study
    return made


def differences(like: DictConfig, overrides: Sequence[str]) -> dict[str, Any] | None:
    """The values that differ, by key. None when more than plain values differ."""
    before = as_typed(like.hydra.overrides.task)
    keys = [key_of(each) for each in overrides]
    if keys != [key_of(each) for each in before] or len(set(keys)) < len(keys):
        return None
    # Of a key and its parent, the later override wins. Groups are chosen before values are set.
    groups = like.hydra.runtime.choices
    values = [key for key in keys if key not in groups]
    parser, found = OverridesParser.create(), dict[str, Any]()
    for key, old, new in zip(keys, before, overrides, strict=True):
        if old == new:
            continue
        near = any(k.startswith(f"{key}.") or key.startswith(f"{k}.") for k in values)
        if key in groups or near or "${" in old:  # an interpolation hides the type of its key
            return None
        if isinstance(OmegaConf.select(like, key, throw_on_resolution_failure=False), Container):
            return None
        given = parser.parse_override(new)
        if not plain(given):
            return None
        found[key] = given.value()
    return found


def plain(override: Override) -> bool:
    """Whether an override changes one existing key to a plain value."""
    value = override.value()
    single = value is None or isinstance(value, bool | int | float | str)
    return override.type is OverrideType.CHANGE and override.package is None and single


def key_of(override: str) -> str:
    """The key of an override, with its ``+`` or ``~``."""
    return override.partition("=")[0]
