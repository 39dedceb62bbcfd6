"""The manifest of a sweep (``sweep.yaml``): its settings, code and data, to detect changes."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stagesweep.base.errors import UserError
from stagesweep.base.files import atomic_text
from stagesweep.store.fingerprint import sources
from stagesweep.store.stage_inputs import (
    code_modules,
    fields_without_effect,
    file_hashes,
    hash_path,
    relevant,
)
from stagesweep.sweep.space.overrides import read_overrides
from stagesweep.sweep.space.space import Space

# How many changed modules an error names.
NAMED = 3


def write(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the manifest of a new sweep."""
    atomic_text(folder / "sweep.yaml", yaml.safe_dump(dict(about), sort_keys=False))


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of the sweep in a folder; None for a new sweep, UserError if it is damaged."""
    file = folder / "sweep.yaml"
    if not file.exists():
        return None
    try:
        found = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _damaged(file, " ".join(str(error).split())) from error
    if not isinstance(found, dict) or not isinstance(found.get("study"), str):
        raise _damaged(file, "it names no study")
    for key in ("space", "config", "code", "files"):
        if not isinstance(found.get(key, {}), dict):
            raise _damaged(file, f"{key} is no mapping")
    return found


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(
        f"{file} is damaged: {reason}; put it back, or name another sweep with "
        "search.study=<name> (finished stages are not trained again)"
    )


def about(space: Space, config: DictConfig) -> dict[str, Any]:
    """Everything that the results of a sweep depend on, as plain values."""
    typed, shared = as_typed(config), plain(config)
    return {
        "space": space.fingerprint(),
        "config": typed,
        "code": code(shared),
        "files": files(shared, space),
        "environment": environment([typed, space.fingerprint(), space.fixed]),
    }


def changes(space: Space, now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """List the changes since the sweep began. Trials before and after them are not comparable."""
    before = {**now, **before}  # older manifests have fewer keys
    lines = [f"space {line}" for line in space.difference(before["space"])]
    old, new = flat(before["config"]), flat(now["config"])
    lines += [
        f"{key}: was {old.get(key, 'absent')}, is {new.get(key, 'absent')}"
        for key in differing(old, new)
    ]
    lines += [f"content of {path}" for path in differing(before["files"], now["files"])]
    names = differing(before["environment"], now["environment"])
    lines += [f"environment variable {name}" for name in names]
    if names := differing(before["code"], now["code"]):
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        lines.append(f"code of {', '.join(names[:NAMED])}{more}")
    return lines


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ, or that only one of the two has."""
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Flatten nested values to dotted keys."""
    if not isinstance(value, dict) or not value:
        return {key: value}
    below = [flat(each, f"{key}.{name}" if key else str(name)) for name, each in value.items()]
    return {k: v for each in below for k, v in each.items()}


# What the trials of a sweep share.
SHARED = ("seed", "init_from", "model", "data", "loss", "stage", "hardware", "objective")


def as_typed(config: DictConfig) -> dict[str, Any]:
    """The config of all trials as plain values, its interpolations as they were typed.

    What an interpolation gives may depend on a swept key, so only a trial resolves it.
    """
    raw: Any = OmegaConf.to_container(config)
    found = {key: _as_typed(config, key, raw[key]) for key in SHARED if raw[key] != "???"}
    if config.search.constraints:
        found["search.constraints"] = OmegaConf.to_container(config.search.constraints)
    loaded: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return loaded


def _as_typed(parent: DictConfig, key: Any, raw: Any) -> Any:
    """A plain value without the fields that change no result."""
    if not isinstance(raw, dict):
        return raw
    node = parent[key]
    skipped = fields_without_effect(node)
    return {str(k): _as_typed(node, k, value) for k, value in raw.items() if k not in skipped}


def plain(config: DictConfig) -> dict[str, Any]:
    """The config of all trials, resolved where it does not depend on a swept or missing value."""
    found: dict[str, Any] = {}
    for key in SHARED:
        with suppress(OmegaConfBaseException):
            found[key] = relevant(config[key])
    return found


def code(shared: Mapping[str, Any]) -> dict[str, str]:
    """The fingerprint of each module that the shared config of trials runs.

    Empty when a module cannot be found: the checks of the sweep report that better.
    """
    try:
        found = sources(code_modules(dict(shared)))
    except UserError:
        return {}
    return {name: found[name] for name in sorted(found)}


def files(shared: Mapping[str, Any], space: Space) -> dict[str, str]:
    """A hash of each input file of the trials: data, checkpoints and weights."""
    model = shared.get("model", {})
    nodes = [shared.get("data"), model, *(model.values() if isinstance(model, dict) else ())]
    found = dict(pair for node in nodes for pair in file_hashes(node).values())
    paths = [shared.get("init_from")]
    for parameter in space.parameters:
        if parameter.name in ("data.path", "init_from"):
            lines = [line for value in parameter.values() for line in parameter.overrides(value)]
            paths += [override.value() for override in read_overrides(lines)]
    there = sorted({path for path in paths if isinstance(path, str) and Path(path).exists()})
    return found | {path: hash_path(Path(path)) for path in there}


def environment(texts: Any) -> dict[str, str | None]:
    """A hash of each environment variable that the texts name: its value may be a secret."""
    names = set(re.findall(r"\$\{oc\.env:\s*([^\s,}]+)", json.dumps(texts)))
    values = {name: os.environ.get(name) for name in sorted(names)}
    return {
        name: None if value is None else hashlib.sha256(value.encode()).hexdigest()
        for name, value in values.items()
    }


def refuse_changed(folder: Path, lines: list[str]) -> UserError:
    """The error for a sweep whose settings, code or data have changed."""
    said = "; ".join(lines)
    return UserError(
        f"{folder} was started with other settings, code or data: {said}; put them back, name "
        "another sweep with search.study=<name>, or set sweep.on_change=continue or "
        "sweep.on_change=new"
    )
