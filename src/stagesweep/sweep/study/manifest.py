"""The manifest of a sweep: what it was begun with, and how a later command differs from that."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from stagesweep.base.errors import UserError
from stagesweep.base.files import atomic_text
from stagesweep.store.fingerprint import sources
from stagesweep.store.stage_inputs import code_modules, hash_path, relevant
from stagesweep.sweep.space.space import Space

# So many modules whose code has changed are named.
NAMED = 3


def write(folder: Path, about: Mapping[str, Any]) -> None:
    """Write down what a sweep is begun with."""
    atomic_text(folder / "sweep.yaml", yaml.safe_dump(dict(about), sort_keys=False))


def read(folder: Path) -> dict[str, Any] | None:
    """What a sweep was begun with; None when it was not."""
    file = folder / "sweep.yaml"
    return yaml.safe_load(file.read_text()) if file.exists() else None


def about(space: Space, config: DictConfig) -> dict[str, Any]:
    """What a sweep is begun with, as plain values: all that its results depend on."""
    shared = plain(config)
    return {
        "space": space.fingerprint(),
        "config": shared,
        "code": code(shared),
        "files": files(shared),
    }


def changes(space: Space, now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Lines that say what is not as it was when the sweep was begun: trials that have ended would
    stand beside others that they cannot be compared with.
    """
    before = {**now, **before}  # that of an older version says less
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
    """The keys whose values differ, or that one of them lacks."""
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested plain values by dotted key."""
    if not isinstance(value, dict) or not value:
        return {key: value}
    below = [flat(each, f"{key}.{name}" if key else str(name)) for name, each in value.items()]
    return {k: v for each in below for k, v in each.items()}


def plain(config: DictConfig) -> dict[str, Any]:
    """What all trials share, as plain values; interpolations of what is swept stay as they are."""
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
    """What identifies the code of each module that trials run, as far as what they share says.

    Empty when there is a module that cannot be found, which the checks of a sweep say better.
    """
    try:
        found = sources(code_modules(dict(shared)))
    except UserError:
        return {}
    return {name: found[name] for name in sorted(found)}


def files(shared: Mapping[str, Any]) -> dict[str, str]:
    """A hash of each file that all trials start from: of data, of weights."""
    paths = [shared.get("data", {}).get("path"), shared.get("init_from")]
    return {str(p): hash_path(Path(p)) for p in paths if p is not None and Path(p).exists()}


def refuse_changed(folder: Path, lines: list[str]) -> UserError:
    """What to say of a sweep whose command has changed."""
    said = "; ".join(lines)
    return UserError(
        f"{folder} was begun with other settings, code or data: {said}; put them back, name "
        "another sweep with search.study=<name>, or set sweep.on_change=continue or "
        "sweep.on_change=new"
    )
