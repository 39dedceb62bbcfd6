"""The settings that all trials of a sweep share, because the controller reads them.

Hydra composes the config of the controller without the swept keys, so with the default experiment
if experiments are swept. What the controller reads is therefore taken from configs of trials.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, is_dataclass
from textwrap import shorten
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from stagesweep.base.errors import UserError
from stagesweep.config.schema import Search, objectives
from stagesweep.sweep.space.parameter import Parameter
from stagesweep.sweep.space.space import Space

# The keys that the controller reads. Where experiments set one of them, all set the same.
KEYS = (
    "objective",
    *(f"search.{field.name}" for field in fields(Search) if field.name != "study"),
    "sweep",
    "hardware.devices",
    "hardware.devices_per_trial",
    "hardware.gpu_ids",
)
# Hydra has built the sampler and the launcher before any trial is composed.
BUILT = ("hydra.launcher", "hydra.sweep.subdir", "hydra.sweeper.sampler")


def share(config: DictConfig, space: Space, launcher: Launcher, done: Collection[str] = ()) -> None:
    """Copy to ``config`` what the controller reads, as the trials of this space have it.

    Parameters in ``done`` are already checked.

    Raises UserError if trials differ in it; the line names two of them and their values.
    """
    label, first = "", dict[str, Any]()
    for other, overrides in alternatives(config, space, done):
        try:
            values = settings(compose(launcher, config, space.arguments(overrides)))
        except (HydraException, OmegaConfBaseException) as error:
            if "before the sweep starts" in str(error):  # hydra.launcher, and what Hydra built
                raise UserError(f"{other}: {error}") from error
            continue  # this trial fails with the message
        if not first:
            label, first = other, values
        for key, value in values.items():
            if value != first[key]:
                raise UserError(difference(key, (label, first[key]), (other, value)))
    if not first:
        return
    before = settings(config)
    for key in BUILT:
        if first[key] != before[key]:
            raise UserError(
                f"{label} sets {key}, which a sweep over it cannot read; set it on the command line"
            )
    with read_write(config), open_dict(config):
        for key in KEYS:
            if first[key] != before[key]:
                replace(config, key, first[key])


def replace(config: DictConfig, key: str, value: Any) -> None:
    """Set a key to a value; of a key with a schema, each field."""
    node = OmegaConf.select(config, key)
    if isinstance(value, dict) and is_dataclass(OmegaConf.get_type(node)):
        for name, each in value.items():
            replace(config, f"{key}.{name}", each)
    else:
        OmegaConf.update(config, key, value, merge=False)


def alternatives(
    config: DictConfig, space: Space, done: Collection[str]
) -> Iterator[tuple[str, list[str]]]:
    """Each value that may change what the controller reads: its name, and its overrides."""
    groups = {name.partition("@")[0] for name in config.hydra.runtime.choices}
    for parameter in space.parameters:
        if set(parameter.keys) <= set(done):
            continue
        if parameter.lines is not None:
            lines = {name: list(each) for name, each in parameter.lines.items()}
            if any(
                is_read(line.partition("=")[0], groups) for each in lines.values() for line in each
            ):
                yield from ((f"{parameter.name}={name}", each) for name, each in lines.items())
        elif any(is_read(key, groups) for key in parameter.keys):
            values = ends(parameter) if groups.isdisjoint(parameter.keys) else parameter.values()
            given = (parameter.overrides(value) for value in values)
            yield from ((" ".join(each), each) for each in given)


def ends(parameter: Parameter) -> list[Any]:
    """The first and the last value of a parameter."""
    if parameter.continuous:
        return [parameter.distribution.low, parameter.distribution.high]  # type: ignore[attr-defined]
    values = parameter.values()
    return [values[0], values[-1]]


def is_read(key: str, groups: set[str]) -> bool:
    """Whether a key is a config group, or is read by the controller."""
    key = key.lstrip("+~").partition("@")[0]
    return key in groups or any(f"{key}.".startswith(f"{each}.") for each in ("search", *KEYS))


def compose(launcher: Launcher, config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Compose the config of a trial."""
    context: Any = getattr(launcher, "hydra_context", None)
    composed: DictConfig = context.config_loader.load_sweep_config(config, list(overrides))
    return composed


def settings(config: DictConfig) -> dict[str, Any]:
    """What the controller reads from a config, as plain values."""
    hydra: Any = HydraConfig.instance()
    before, hydra.cfg = hydra.cfg, config
    try:
        found = {key: plain(config, key, resolve=True) for key in KEYS}
        found["seed"] = config.seed if config.search.repeats > 1 else None
        return found | {key: plain(config, key, resolve=False) for key in BUILT}
    finally:
        hydra.cfg = before


def plain(config: DictConfig, key: str, resolve: bool) -> Any:
    """The value of a key as plain data. Not resolved if it depends on a missing value."""
    if not resolve:
        parent, _, name = key.rpartition(".")
        return OmegaConf.to_container(OmegaConf.select(config, parent))[name]  # type: ignore[call-overload,index]
    try:
        value = OmegaConf.select(config, key)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException:
        return plain(config, key, resolve=False) if "." in key else None


def difference(key: str, one: tuple[str, Any], other: tuple[str, Any]) -> str:
    """The message for two trials that differ in a key."""
    (a, first), (b, second) = ((label, text(key, value)) for label, value in (one, other))
    return (
        f"trials of one sweep share {key}: {a} has {first}, {b} has {second}; "
        f"set {key} for all, or sweep them one by one"
    )


def text(key: str, value: Any) -> str:
    """A value for a message."""
    if key == "objective":
        modes = objectives(OmegaConf.create(value))
        return ", ".join(f"{name} ({mode})" for name, mode in modes.items())
    return shorten(str(value), width=60, placeholder=" …")
