"""What comes before the first trial: checks of the whole sweep, its folder, its lock."""

import logging
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from stagesweep.config.schema import Search
from stagesweep.sweep.engine.backends import Places
from stagesweep.sweep.engine.slots import Slots
from stagesweep.sweep.space.grammar import ABLATION
from stagesweep.sweep.space.space import Space
from stagesweep.sweep.study import manifest
from stagesweep.sweep.study.url import without_password

log = logging.getLogger(__name__)

LOCK = ".lock"


def without_hydra(arguments: Sequence[str]) -> list[str]:
    """The overrides that are the trials' own."""
    return [each for each in arguments if not each.lstrip("+~").startswith(("hydra.", "hydra/"))]


def chosen_pruner(settings: Search, objectives: Sequence[str]) -> BasePruner | None:
    """The pruner; None when every trial runs to its end."""
    if not settings.pruner:
        return None
    if len(objectives) > 1:
        raise UserError(
            f"a pruner compares trials by one objective, and there are {len(objectives)} "
            f"({', '.join(objectives)}); leave search/pruner=none, or steer by one of them"
        )
    made: BasePruner = instantiate(settings.pruner, _execution_whitelist_=("optuna.*",))
    if isinstance(made, WilcoxonPruner) and settings.repeats == 1:
        raise UserError(
            "search/pruner=wilcoxon compares the repeats of a point, and each has only one run; "
            "set search.repeats=8, or choose another pruner"
        )
    return made


def pruned_on(pruner: BasePruner | None, settings: Search, objective: str) -> str | None:
    """The metric of a fit that the pruner looks at; None when it looks at none."""
    if pruner is None or isinstance(pruner, WilcoxonPruner):
        return None
    return settings.prune_on or objective


def check(config: DictConfig, space: Space, launcher: Launcher, places: Places) -> None:
    """Validate what the trials share; what is swept may still be open and is checked in each."""
    overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    swept = {o.get_key_element() for o in overrides if o.is_sweep_override()}
    swept |= {key for name in space.distributions for key in name.split(",")} - {ABLATION}
    if config.search.repeats > 1 and "seed" in swept:
        raise UserError("search.repeats runs each point under several seeds; do not sweep seed")
    if swept & set(config.hydra.runtime.choices):
        return
    for key in filter(partial(absent, config), sorted(swept)):
        # Composition says it as for a single run.
        context: Any = getattr(launcher, "hydra_context", None)
        context.config_loader.load_sweep_config(config, [f"{key}=null"])
    if any(OmegaConf.is_missing(config, key) for key in swept):
        return
    if isinstance(places, Slots):  # in a process that has imported torch already: this one need not
        places.call(validate_shared, config)
    else:
        validate_shared(config)


def validate_shared(config: DictConfig) -> None:
    """Validate the config of a sweep as that of a run."""
    from stagesweep.config.validation import validate

    HydraConfig.instance().set_config(config)
    shared = config.copy()
    OmegaConf.set_readonly(shared, False)
    with open_dict(shared):
        del shared["hydra"]
    validate(shared)


def absent(config: DictConfig, key: str) -> bool:
    """Whether no trial can have that key, whatever its value."""
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    return key[0].isalpha() and isinstance(node, DictConfig) and leaf not in node.keys()  # noqa: SIM118


def place(
    config: DictConfig, sweeper: DictConfig, space: Space, about: dict[str, Any]
) -> tuple[Path, bool]:
    """The folder of the sweep, and whether the sweep was begun there with these very settings."""
    base, wanted = Path(config.hydra.sweep.dir), config.sweep.on_change
    if wanted not in ("refuse", "continue", "new"):
        raise UserError(f"sweep.on_change={wanted} must be refuse, continue or new")
    folder, count, name, lines = base, 1, str(sweeper.study_name), list[str]()
    while (before := manifest.read(folder)) is not None:
        lines = manifest.changes(space, about, before)
        if not lines or wanted == "continue":
            sweeper.study_name = before["study"]
            if lines:
                log.warning("going on with what has changed: %s", "; ".join(lines))
            break
        if wanted == "refuse":
            raise manifest.refuse_changed(folder, lines)
        count += 1
        folder = base.with_name(f"{base.name}_{count}")
    if before is None and folder.exists() and {path.name for path in folder.iterdir()} - {LOCK}:
        raise UserError(
            f"{folder} holds results already; give this sweep a name of its own with "
            "search.study=<name> (finished stages are not trained again)"
        )
    if folder != base:
        sweeper.storage = str(sweeper.storage).replace(str(base), str(folder))
        if before is None:
            sweeper.study_name = f"{name}_{count}"
    # Each trial is composed anew: its folder stays here, even when the experiment is swept.
    quoted = str(folder).replace("'", r"\'")
    with read_write(config.hydra), read_write(config.search):
        config.hydra.sweep.dir = str(folder)
        config.search.study = sweeper.study_name
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")
    return folder, before is not None and not lines


def record(
    folder: Path, sweeper: DictConfig, arguments: Sequence[str], about: dict[str, Any]
) -> None:
    """Write down what a sweep is begun with, if it was not; no password."""
    if manifest.read(folder) is None:
        url, bare = str(sweeper.storage), without_password(str(sweeper.storage))
        command = shlex.join(["stagesweep", "-m", *arguments]).replace(url, bare)
        names = {"study": sweeper.study_name, "storage": bare}
        manifest.write(folder, {"command": command, **names, **about})


def keep_secret(config: DictConfig, storage: str) -> None:
    """Take the password of a storage out of what each trial writes down."""
    bare = without_password(storage)
    with read_write(config.hydra):
        config.hydra.sweeper.storage = bare
        given = config.hydra.overrides.hydra
        config.hydra.overrides.hydra = [each.replace(storage, bare) for each in given]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One controller at a time: UserError for a second."""
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
