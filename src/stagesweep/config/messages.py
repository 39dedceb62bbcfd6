"""One-line messages for errors in a config, with the key and the remedy."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import get_origin

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    OmegaConfBaseException,
)
from yaml import MarkedYAMLError

from stagesweep.base import compat, files
from stagesweep.base.errors import FailedTrials, UserError, chain


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name: "did you mean 'x'?", or all known names."""
    names = list(known)
    if close := get_close_matches(name, names, n=1):
        return f"did you mean '{close[0]}'?"
    return f"there are {', '.join(names)}" if names else "there are none"


def explain(error: BaseException) -> str | None:
    """One line for an error that the user can fix; None for a bug."""
    links = list(chain(error))
    for link in links:
        if isinstance(link, FailedTrials):
            return str(link)
        if isinstance(link, UserError):
            return _visible(str(link))
    for link in links:
        if (file := compat.config_being_loaded(link)) is not None:
            return f"cannot read {file}: {_fault_of_file(link)}"
    for link in links:
        match link:
            case MissingConfigException(missing_cfg_file=str(path)):
                return missing_option(path, link.options or ())
            case OverrideParseException():
                cause = link.__cause__ or link.__context__
                return f"cannot read '{_visible(link.override)}': {_one_line(str(cause or link))}"
            case ConfigCompositionException() if "Error merging override +" in str(link):
                return _failed_addition(str(link).partition("+")[2], link.__cause__ or link)
            case OmegaConfBaseException(full_key=str(key)) if key:
                place = re.match(r"In '(.+)': ", str(error))
                return (f"{place[1]}.yaml: " if place else "") + _key_error(key, link)
            case OSError(filename=str(path)):
                return str(files.file_error(link, Path(path)))
    if _raised_in(error) == "logging.config":
        said = ": ".join(_one_line(str(link)) for link in links)
        return f"hydra.hydra_logging or hydra.job_logging: {said}"
    if _raised_in(error) == "hydra.core.plugins":
        return (
            f"{_one_line(str(error)) or 'wrong kind of plugin'}; choose hydra/launcher=<name> and "
            "hydra/sweeper=<name> of the installed ones (stagesweep --info plugins)"
        )
    from_hydra = isinstance(error, HydraException) or (
        isinstance(error, ValueError) and _raised_in(error).startswith("hydra.")
    )
    return _one_line(str(error)) if from_hydra else _failed_construction(error)


def _fault_of_file(error: BaseException) -> str:
    """What is wrong with a config file, and where if that is known."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        where = f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
        return f"{_one_line(error.problem or 'it is no YAML')} ({where})"
    return _one_line(str(error)) or type(error).__name__


def _raised_in(error: BaseException) -> str:
    """Name of the module that raised the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")) if trace is not None else ""


def _visible(text: str) -> str:
    """A text with values as typed, in which the end of a line and the like are seen."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _one_line(text: str) -> str:
    """Join the lines of a message, without links."""
    lines = (line.strip().rstrip(".") for line in text.splitlines())
    text = "; ".join(line for line in lines if line and not line.startswith("See http"))
    return text.replace(":; ", ": ")


def _key_error(key: str, error: OmegaConfBaseException) -> str:
    """Message for an OmegaConf error about one key."""
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        parent = error.parent_node
        keys = [str(k) for k in parent] if isinstance(parent, DictConfig) else []
        hint = nearest(str(error.key), keys)
        addable = get_origin(error.ref_type) is dict and "did you mean" not in hint
        group, _, name = key.rpartition(".")
        remedy = f"; add it with '+{group}={{{name}: …}}'" if addable else ""
        return f"unknown key '{key}': {hint}{remedy}"
    text = _said_by_omegaconf(error)
    if isinstance(error, InterpolationKeyError):
        if own := re.search(r"'hydra\.([^']+)' not found", text):
            return f"{key}: {text}; settings of Hydra are read by ${{hydra:{own[1]}}}"
        return f"{key}: {text}; put that back, or give {key} a value of its own"
    return f"{key} must not be null" if "is not Optional" in text else f"{key}: {text}"


def _said_by_omegaconf(error: BaseException) -> str:
    """The message of an error without the lines that OmegaConf adds to it."""
    return _visible(str(error).partition("\n    full_key: ")[0])


def _failed_addition(override: str, error: BaseException) -> str:
    """Message for a ``+key=value`` that failed. A typed mapping takes only a mapping."""
    key, _, value = override.lstrip("+").partition("=")
    group, _, name = key.rpartition(".")
    text = _said_by_omegaconf(error)
    if "is not a subclass of" in text:
        return f"cannot add '{key}' like this; use '+{group}={{{name}: {value}}}'"
    return f"{key}: {text}"


def _failed_construction(error: BaseException) -> str | None:
    """Message for a target that raised while it was built; Hydra adds the key as a note."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith("full_key: ")]
    if not notes:
        return None
    key = notes[0].removeprefix("full_key: ")
    return (
        f"{key}: {type(error).__name__}: {_one_line(str(error))} (HYDRA_FULL_ERROR=1 shows where)"
    )


def missing_option(path: str, options: Iterable[str]) -> str:
    """Message for a config group, or an option of a group, that does not exist."""
    group, _, option = path.rpartition("/")
    known = [o for o in options if not o.startswith("base_")]
    if not known:
        return f"no config '{path}' in any config folder"
    there = f"there are {', '.join(known)}"
    hint = nearest(option, known)
    return f"no '{option}' in group '{group}': {hint if hint == there else f'{hint} {there}'}"
