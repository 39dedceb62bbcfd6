"""The packages whose classes a config may name as ``_target_``.

The user's own are read when this module is imported, at the start of the command, before Hydra
sets the variables of ``hydra.job.env_set``: a config cannot trust itself.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from stagesweep.base.errors import UserError

VARIABLE = "STAGESWEEP_TRUST"
OURS = ("stagesweep.*",)
# Of these, classes of the kinds that a key expects; see `signatures.locate`.
LIBRARIES = ("torch.*", "sklearn.*", "optuna.*")
# Variables that decide which code a process runs; no config may set them.
RESERVED = (VARIABLE, "PYTHON", "LD_", "DYLD_")


def read() -> tuple[str, ...]:
    """Patterns of the packages (or single names) in ``STAGESWEEP_TRUST=mylab,other.models``."""
    added = os.environ.get(VARIABLE, "").replace(",", " ").split()
    names = [name.removesuffix(".*") for name in added]
    return tuple(pattern for name in names for pattern in (name, f"{name}.*"))


added = read()


def own() -> tuple[str, ...]:
    """Patterns of our own targets and of the user's."""
    return (*OURS, *added)


def trusted() -> tuple[str, ...]:
    """Patterns of the targets that a config may instantiate, for Hydra's execution whitelist."""
    return (*OURS, *LIBRARIES, *added)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a dotted name matches one of the patterns ``name`` and ``package.*``."""
    return any(
        name.startswith(pattern[:-1]) if pattern.endswith(".*") else name == pattern
        for pattern in patterns
    )


def check_variables(env_set: Mapping[str, Any]) -> None:
    """Refuse a ``hydra.job.env_set`` that changes which code is run, here or in new processes."""
    for name in map(str, env_set):
        if name.startswith(RESERVED):
            raise UserError(
                f"hydra.job.env_set.{name}: no config can set it; export it before the command"
            )
