"""What happens before the first trial: the search space, validation, the folder and its lock."""

import logging
import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.launcher import Launcher
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from optuna.pruners import BasePruner, WilcoxonPruner

from stagesweep.base.errors import UserError
from stagesweep.config.nodes import as_typed
from stagesweep.config.schema import Search
from stagesweep.config.signatures import locate_all
from stagesweep.sweep.engine import shared_settings
from stagesweep.sweep.engine.backends import Backend
from stagesweep.sweep.engine.slots import SlotBackend
from stagesweep.sweep.space.grammar import ABLATION, parse
from stagesweep.sweep.space.overrides import quoted, read_overrides
from stagesweep.sweep.space.space import Space
from stagesweep.sweep.study import manifest
from stagesweep.sweep.study.url import without_password

log = logging.getLogger(__name__)

LOCK = ".lock"


def share_settings(
    config: DictConfig, launcher: Launcher, arguments: Sequence[str]
) -> Collection[str]:
    """Take what the controller reads, the space included, from trials of the command line.

    Returns the keys that the command line sweeps.
    """
    typed = trial_overrides(arguments)
    swept = {each.get_key_element() for each in read_overrides(typed) if each.is_sweep_override()}
    zipped = [keys for keys in config.search.zip if swept.issuperset(keys)]
    space = parse({}, typed, zipped=zipped)
    shared_settings.share(config, space, launcher)
    return {key for parameter in space.parameters for key in parameter.keys}


def search_settings(config: DictConfig) -> Search:
    """The settings of a search. Space and points are as typed: only a trial resolves them."""
    raw: Any = OmegaConf.to_container(config.search)
    typed = {key: raw[key] for key in ("space", "enqueue")}
    others = {f.name: config.search[f.name] for f in fields(Search) if f.name not in typed}
    read: dict[str, Any] = {
        name: OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
        for name, value in others.items()
    }
    return Search(**typed, **read)


def search_space(
    config: DictConfig, sweeper: DictConfig, settings: Search, arguments: Sequence[str]
) -> tuple[Space, list[dict[str, Any]] | None]:
    """The space of a sweep and, for a grid, its points; UserError if there is nothing to search."""
    space = parse(
        settings.space,
        trial_overrides(arguments),
        zipped=settings.zip,
        when=settings.when,
        variants=settings.ablation.variants,
        leave_one_out=settings.ablation.leave_one_out,
    )
    choices = config.hydra.runtime.choices
    if not space.parameters and choices.get("search") == "ablation":
        raise UserError(
            f"no variants; write conf/search/ablation/{choices.experiment}.yaml, or name them: "
            "\"search.ablation.leave_one_out=['~stage.<name>.loss.<term>']\""
        )
    is_grid = str(sweeper.sampler.get("_target_", "")).endswith("GridSampler")
    if not space.parameters and not is_grid:
        raise UserError(
            "nothing to search; choose search/space=<name>, or sweep a key: "
            "'stage.<name>.optimizer.lr=interval(1e-4, 1e-2)'"
        )
    return space, list(space.points(settings.max_points)) if is_grid else None


def trial_overrides(arguments: Sequence[str]) -> list[str]:
    """The overrides of the command line, without those of Hydra itself."""
    return [each for each in arguments if not each.lstrip("+~").startswith(("hydra.", "hydra/"))]


def make_pruner(settings: Search, objectives: Sequence[str]) -> BasePruner | None:
    """The pruner of a sweep, or None; UserError if it does not fit the objectives or repeats."""
    if not settings.pruner:
        return None
    if len(objectives) > 1:
        raise UserError(
            f"a pruner compares trials by one objective, and there are {len(objectives)} "
            f"({', '.join(objectives)}); leave search/pruner=none, or optimise one of them"
        )
    locate_all("search.pruner", settings.pruner)
    pruner: BasePruner = instantiate(settings.pruner, _execution_whitelist_=("optuna.*",))
    if isinstance(pruner, WilcoxonPruner) and settings.repeats == 1:
        raise UserError(
            "search/pruner=wilcoxon compares the repeats of a point, and each point has only one; "
            "set search.repeats=8, or choose another pruner"
        )
    return pruner


def pruning_metric(pruner: BasePruner | None, settings: Search, objective: str) -> str | None:
    """The metric that jobs report after each epoch, or None if the pruner needs no reports."""
    if pruner is None or isinstance(pruner, WilcoxonPruner):
        return None
    return settings.prune_on or objective


def validate_sweep(config: DictConfig, space: Space, launcher: Launcher, backend: Backend) -> None:
    """Validate the config that all trials share, before the first one.

    Skipped if a config group or a mandatory value is swept: then each trial is validated alone.
    """
    overrides = OverridesParser.create().parse_overrides(as_typed(config.hydra.overrides.task))
    swept = {o.get_key_element() for o in overrides if o.is_sweep_override()}
    swept |= {key for name in space.distributions for key in name.split(",")} - {ABLATION}
    if config.search.repeats > 1 and "seed" in swept:
        raise UserError("search.repeats runs each point under several seeds; do not sweep seed")
    if swept & set(config.hydra.runtime.choices):
        return
    for key in filter(partial(is_unknown_key, config), sorted(swept)):
        # Composition raises the same error as for a single run.
        context: Any = getattr(launcher, "hydra_context", None)
        context.config_loader.load_sweep_config(config, [f"{key}=null"])
    # A key that is added has no value here either, and others may refer to it.
    if any(key.startswith("+") or is_missing(config, key) for key in swept):
        return
    if isinstance(backend, SlotBackend):  # its server has imported torch; this process need not
        backend.call(validate_config, config)
    else:
        validate_config(config)


def validate_config(config: DictConfig) -> None:
    """Validate the config of a sweep like that of a run."""
    # Not at the top: it may run in the fork server only.
    from stagesweep.config.validation import validate

    shared = config.copy()
    with read_write(shared.hydra), open_dict(shared.hydra):  # as of the first trial
        shared.hydra.job.update(num=0, id="0")
        folder = Path(shared.hydra.sweep.dir, str(shared.hydra.sweep.subdir))
        shared.hydra.runtime.output_dir = str(folder.absolute())
    HydraConfig.instance().set_config(shared)
    OmegaConf.set_readonly(shared, False)
    with open_dict(shared):
        del shared["hydra"]
    validate(shared)


def is_unknown_key(config: DictConfig, key: str) -> bool:
    """Whether the config has no such key."""
    node, leaf = parent(config, key)
    return key[0].isalpha() and isinstance(node, DictConfig) and leaf not in node.keys()  # noqa: SIM118


def is_missing(config: DictConfig, key: str) -> bool:
    """Whether a key has no value yet (``???``).

    `OmegaConf.missing_keys` would resolve the typed overrides, which are below ``hydra``.
    """
    node, leaf = parent(config, key)
    return isinstance(node, DictConfig) and OmegaConf.is_missing(node, leaf)


def parent(config: DictConfig, key: str) -> tuple[Any, str]:
    """The node that a key is in, and its name there."""
    path, _, leaf = key.rpartition(".")
    if not path:
        return config, leaf
    return OmegaConf.select(config, path, throw_on_resolution_failure=False), leaf


def check_study_name(name: str) -> None:
    """Raise UserError if the name of a study cannot be the name of a folder."""
    if not re.fullmatch(r"\w[\w.-]*", name) or ".." in name:
        raise UserError(
            f"search.study={name} must be a name: letters, digits, '.', '_' and '-'; "
            "the folder is hydra.sweep.dir"
        )


def choose_folder(
    config: DictConfig, sweeper: DictConfig, space: Space, about: dict[str, Any]
) -> tuple[Path, bool]:
    """The folder of a sweep, and whether the same sweep began in it before.

    ``sweep.on_change`` decides if the folder has a sweep with other settings: refuse raises
    UserError, continue takes the folder, new takes the first free one of <folder>_2, <folder>_3 …
    Writes folder and study name into ``config`` and ``sweeper``.
    """
    check_study_name(str(config.search.study))
    base, on_change = Path(config.hydra.sweep.dir), config.sweep.on_change
    if on_change not in ("refuse", "continue", "new"):
        raise UserError(f"sweep.on_change={on_change} must be refuse, continue or new")
    if "?" in str(base) and str(sweeper.storage).startswith("sqlite"):
        raise UserError(f"hydra.sweep.dir={base}: a URL ends at '?'; name the folder without it")
    folder, count, name, changes = base, 1, str(sweeper.study_name), list[str]()
    while (before := manifest.read(folder)) is not None:
        changes = manifest.changes(space, about, before)
        if not changes or on_change == "continue":
            sweeper.study_name = before["study"]
            if changes:
                log.warning("continuing with changes: %s", "; ".join(changes))
            break
        if on_change == "refuse":
            raise manifest.refuse_changed(folder, changes)
        count += 1
        folder = base.with_name(f"{base.name}_{count}")
    if before is None and folder.exists() and {path.name for path in folder.iterdir()} - {LOCK}:
        raise UserError(
            f"{folder} already holds results; give this sweep another name with "
            "search.study=<name> (finished stages are not trained again)"
        )
    if folder != base:
        sweeper.storage = str(sweeper.storage).replace(str(base), str(folder))
        if before is None:
            sweeper.study_name = f"{name}_{count}"
    # An override, because each trial is composed anew: without it a swept experiment would have a
    # folder for each of its values.
    with read_write(config.hydra), read_write(config.search):
        config.hydra.sweep.dir = str(folder)
        config.search.study = sweeper.study_name
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(str(folder))}")
    return folder, before is not None and not changes


def write_manifest(
    folder: Path, sweeper: DictConfig, arguments: Sequence[str], about: dict[str, Any]
) -> None:
    """Write the manifest of a new sweep, without the password of its storage."""
    if manifest.read(folder) is None:
        url, bare = str(sweeper.storage), without_password(str(sweeper.storage))
        command = shlex.join(["stagesweep", "-m", *arguments]).replace(url, bare)
        names = {"study": sweeper.study_name, "storage": bare}
        manifest.write(folder, {"command": command, **names, **about})


def remove_password(config: DictConfig, storage: str) -> None:
    """Remove the password of the storage from the config that each trial saves."""
    bare = without_password(storage)
    with read_write(config.hydra):
        config.hydra.sweeper.storage = bare
        overrides = as_typed(config.hydra.overrides.hydra)
        config.hydra.overrides.hydra = [each.replace(storage, bare) for each in overrides]


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a sweep's folder; UserError if another controller holds it."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"another process is running the sweep in {folder}; wait for it, or name another "
            "with search.study=<name>"
        ) from error
    try:
        yield
    finally:
        lock.release()
