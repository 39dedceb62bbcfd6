"""The packages whose classes a config may name as ``_target_``."""

import os

TRUSTED = ("stagesweep.*", "torch.*", "sklearn.*", "optuna.*")


def trusted() -> tuple[str, ...]:
    """Patterns of the targets that a config may instantiate, for Hydra's execution whitelist.

    Users add packages of their own in the environment: ``STAGESWEEP_TRUST=mylab,other.models``.
    A config cannot add any, so a config from elsewhere cannot run other code.
    """
    added = os.environ.get("STAGESWEEP_TRUST", "").replace(",", " ").split()
    return (*TRUSTED, *(f"{package.removesuffix('.*')}.*" for package in added))
