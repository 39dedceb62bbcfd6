"""The manifest of a sweep (``sweep.yaml``): its settings, code and data, to detect changes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from stagesweep.base.errors import UserError
from stagesweep.base.files import atomic_text
from stagesweep.store.fingerprint import sources
from stagesweep.store.stage_inputs import code_modules, file_hashes, hash_path, relevant
from stagesweep.sweep.space.space import Space

# How many changed modules an error names.
NAMED = 3


def write(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the manifest of a new sweep."""
    atomic_text(folder / "sweep.yaml", yaml.safe_dump(dict(about), sort_keys=False))


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of the sweep in a folder; None for a new sweep."""
    file = folder / "sweep.yaml"
    return yaml.safe_load(file.read_text()) if file.exists() else None


def about(space: Space, config: DictConfig) -> dict[str, Any]:
    """Everything that the results of a sweep depend on, as plain values."""
    shared = plain(config)
    return {
        "space": space.fingerprint(),
        "config": shared,
        "code": code(shared),
        "files": files(shared),
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


def plain(config: DictConfig) -> dict[str, Any]:
    """The config of all trials as plain values. Interpolations of swept keys stay unresolved."""
    keys = ("seed", "init_from", "model", "data", "loss", "stage", "hardware", "objective")
    found: dict[str, Any] = {}
    for key in keys:
        if OmegaConf.is_missing(config, key):
            continue
        try:
            found[key] = relevant(config[key])
        except Exception:
            found[key] = OmegaConf.to_container(config[key], resolve=False)
    if config.search.constraints:
        found["search.constraints"] = OmegaConf.to_container(config.search.constraints)
    loaded: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return loaded


def code(shared: Mapping[str, Any]) -> dict[str, str]:
    """The fingerprint of each module that the shared config of trials runs.

    Empty when a module cannot be found: the checks of the sweep report that better.
    """
    try:
        found = sources(code_modules(dict(shared)))
    except UserError:
        return {}
    return {name: found[name] for name in sorted(found)}


def files(shared: Mapping[str, Any]) -> dict[str, str]:
    """A hash of each input file of the trials: data, checkpoints and weights."""
    model = shared.get("model", {})
    nodes = [shared.get("data"), model, *(model.values() if isinstance(model, dict) else ())]
    found = dict(pair for node in nodes for pair in file_hashes(node).values())
    weights = shared.get("init_from")
    if weights is not None and Path(weights).exists():
        found[str(weights)] = hash_path(Path(weights))
    return found


def refuse_changed(folder: Path, lines: list[str]) -> UserError:
    """The error for a sweep whose settings, code or data have changed."""
    said = "; ".join(lines)
    return UserError(
        f"{folder} was started with other settings, code or data: {said}; put them back, name "
        "another sweep with search.study=<name>, or set sweep.on_change=continue or "
        "sweep.on_change=new"
    )
