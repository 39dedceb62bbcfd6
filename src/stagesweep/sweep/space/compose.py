"""The config of a run of a sweep, as Hydra composes it, or in a hundredth of the time.

Most runs of a sweep differ from its first one in values only. Hydra would read and merge every
file again for each of them; here the values are put into a config that it has composed.
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


@dataclass(frozen=True)
class Work:
    """What the runs of a sweep have in common; it travels to the processes that run them.

    ``master``, pickled, is what Hydra composes them from, and ``task`` where they find the function
    to call. ``folder`` is the sweep's. ``like`` is the config of one of the runs.
    """

    context: HydraContext
    master: bytes
    task: tuple[str, str]
    folder: Path
    like: DictConfig | None = None


def shared(context: HydraContext, master: DictConfig, task: tuple[str, str]) -> Work:
    """The work of a sweep that is begun in the folder of ``master``."""
    return Work(context, pickle.dumps(master), task, Path(master.hydra.sweep.dir))


def with_example(
    context: HydraContext, master: DictConfig, task: tuple[str, str], overrides: Sequence[str]
) -> bytes:
    """The work with the config of a run, pickled."""
    setup_globals()
    example = composed(context, master, overrides)
    return pickle.dumps(replace(shared(context, master, task), like=example))


def compose(work: Work, overrides: Sequence[str]) -> DictConfig:
    """The config with these overrides. It may be ``work.like`` itself, changed."""
    if work.like is not None and (values := differences(work.like, overrides)) is not None:
        try:
            for key, value in values.items():
                OmegaConf.update(work.like, key, value, merge=True)
            work.like.hydra.overrides.task = list(overrides)
            return work.like
        except OmegaConfBaseException:
            pass  # what is wrong with a value, Hydra says best
    return composed(work.context, pickle.loads(work.master), overrides)


def composed(context: HydraContext, master: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config as Hydra composes it, in the folder and the study of the sweep."""
    made: DictConfig = context.config_loader.load_sweep_config(master, list(overrides))
    with open_dict(made):
        made.hydra.sweep.dir = master.hydra.sweep.dir
        made.search.study = master.search.study
    return made


def differences(like: DictConfig, overrides: Sequence[str]) -> dict[str, Any] | None:
    """By key, the values in which other overrides differ; None when they differ in more."""
    before = list(like.hydra.overrides.task)
    keys = [key_of(each) for each in overrides]
    if keys != [key_of(each) for each in before] or len(set(keys)) < len(keys):
        return None
    # Of a key and one above it, the later wins; but groups are chosen before values are set.
    groups = like.hydra.runtime.choices
    values = [key for key in keys if key not in groups]
    parser, found = OverridesParser.create(), dict[str, Any]()
    for key, old, new in zip(keys, before, overrides, strict=True):
        if old == new:
            continue
        near = any(k.startswith(f"{key}.") or key.startswith(f"{k}.") for k in values)
        if key in groups or near or isinstance(OmegaConf.select(like, key), Container):
            return None
        given = parser.parse_override(new)
        if not plain(given):
            return None
        found[key] = given.value()
    return found


def plain(override: Override) -> bool:
    """Whether an override sets one value of a key that is there."""
    value = override.value()
    single = value is None or isinstance(value, bool | int | float | str)
    return override.type is OverrideType.CHANGE and override.package is None and single


def key_of(override: str) -> str:
    """What an override is about, with its ``+`` or ``~``."""
    return override.partition("=")[0]
