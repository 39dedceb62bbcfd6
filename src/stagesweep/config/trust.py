"""What a config may name as `_target_`."""

import os

# What a config may name as `_target_`.
TRUSTED = ("stagesweep.*", "torch.*", "sklearn.*", "optuna.*")


def trusted() -> tuple[str, ...]:
    """Patterns of the targets that may be instantiated from a config.

    A user adds packages of their own in the environment: ``STAGESWEEP_TRUST=mylab,other.models``.
    Only the person at the command line can, never a config: that is the point of the list.
    """
    added = os.environ.get("STAGESWEEP_TRUST", "").replace(",", " ").split()
    return (*TRUSTED, *(f"{package.removesuffix('.*')}.*" for package in added))
