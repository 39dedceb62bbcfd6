"""Errors of composition, said in one line that names the key and the remedy."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import get_origin

from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from stagesweep import files
from stagesweep.errors import UserError


def nearest(name: str, known: Iterable[str]) -> str:
    """What a mistyped name may have meant: "did you mean 'x'?", or all there is."""
    names = list(known)
    if close := get_close_matches(name, names, n=1):
        return f"did you mean '{close[0]}'?"
    return f"there are {', '.join(names)}" if names else "there are none"


def explain(error: BaseException) -> str | None:
    """The one line for an error that a person can mend; None for a fault of the program."""
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, UserError):
            return str(link)
    for link in chain:
        match link:
            case InstantiationException():
                return _construction(link)
            case MissingConfigException(missing_cfg_file=str(path)):
                return _missing_option(path, link.options or ())
            case OverrideParseException():
                cause = link.__cause__ or link.__context__
                return f"cannot read '{link.override}': {_flat(str(cause or link))}"
            case OmegaConfBaseException(full_key=str(key)) if key:
                return _about(key, link)
            case OSError(filename=str(path)):
                return str(files.explain(link, Path(path)))
    said_by_hydra = isinstance(error, HydraException) or (
        isinstance(error, ValueError) and _raised_in(error).startswith("hydra.")
    )
    return _flat(str(error)) if said_by_hydra else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _raised_in(error: BaseException) -> str:
    """Name of the module whose code raised the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")) if trace is not None else ""


def _flat(text: str) -> str:
    """The lines of a message that say something, on one line."""
    lines = (line.strip().rstrip(".") for line in text.splitlines())
    return "; ".join(line for line in lines if line and not line.startswith("See http"))


def _about(key: str, error: OmegaConfBaseException) -> str:
    """What OmegaConf has to say about one key."""
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        parent = error.parent_node
        keys = [str(k) for k in parent] if isinstance(parent, DictConfig) else []
        hint = nearest(str(error.key), keys)
        addable = get_origin(error.ref_type) is dict and "did you mean" not in hint
        group, _, name = key.rpartition(".")
        remedy = f"; add it with '+{group}={{{name}: …}}'" if addable else ""
        return f"unknown key '{key}': {hint}{remedy}"
    said = str(error).splitlines()[0]
    return f"{key} must not be null" if "is not Optional" in said else f"{key}: {said}"


def _construction(error: InstantiationException) -> str:
    """What the constructor of a node said; it may be the code's fault as well as the config's."""
    if (cause := error.__cause__) is None:
        return _flat(str(error))
    _, _, key = str(error).rpartition("full_key: ")
    said = f"{type(cause).__name__}: {_flat(str(cause))}"
    return f"{key}: {said} (HYDRA_FULL_ERROR=1 shows where)"


def _missing_option(path: str, options: Iterable[str]) -> str:
    """A group, or an option of a group, that is not there."""
    group, _, option = path.rpartition("/")
    known = [o for o in options if not o.startswith("base_")]
    if not known:
        return f"no config '{path}' in any config folder"
    there = f"there are {', '.join(known)}"
    hint = nearest(option, known)
    return f"no '{option}' in group '{group}': {hint if hint == there else f'{hint} {there}'}"
