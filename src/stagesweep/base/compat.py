"""Private names of Hydra, Optuna and torch that stagesweep needs, each with the reason.

A private name may change in any release. No other module touches one, so that an upgrade is
fixed here; ``tests/base/test_compat.py`` says which name has changed. Imports nothing at module
level: a command that only prints help reads this module, too.
"""

from collections.abc import Callable
from typing import Any

# ----------------------------------------------------------------------------------- Optuna


def optuna_tables() -> Any:
    """The SQLAlchemy tables of Optuna's database.

    Optuna has no public way to write several changes in one transaction, or without reading first.
    """
    from optuna.storages._rdb import models

    return models


def optuna_distribution(override: Any) -> Any:
    """The Optuna distribution of an override that sweeps a key, parsed by Hydra's Optuna sweeper.

    The sweeper has no public parser of its search space.
    """
    from hydra_plugins.hydra_optuna_sweeper._impl import create_optuna_distribution_from_override

    return create_optuna_distribution_from_override(override)


# ------------------------------------------------------------------------------------ Hydra

_CONFIG_LOADER = "hydra._internal.config_repository"


def config_being_loaded(error: BaseException) -> str | None:
    """The config file that Hydra was loading when the error was raised; None if it was not.

    Hydra lets errors of the file pass as they are, and most of them do not name it.
    """
    found, trace = None, error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        loads = frame.f_code.co_name == "load_config" and frame.f_locals.get("source")
        if loads and frame.f_globals.get("__name__") == _CONFIG_LOADER:
            name = str(frame.f_locals["config_path"])
            found = f"{loads.path}/{name.removesuffix('.yaml')}.yaml"
        trace = trace.tb_next
    return found


# ------------------------------------------------------------------------------------ torch

# The first optimizer that a process builds imports this module, which takes about a second.
# Processes that others are forked from import it beforehand. torch has no public name for it.
OPTIMIZER_IMPORTS = "torch._dynamo"


def die_with_parent(signum: int) -> None:
    """Have the kernel send this process a signal when its parent process ends (Linux only).

    Python has no call for prctl's PR_SET_PDEATHSIG. ``torch.multiprocessing`` has one, but calls
    it only in ``start_processes``, which the elastic launcher uses with SIGINT: a process that
    waits inside a collective operation does not act on that.
    """
    from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

    _prctl_pr_set_pdeathsig(signum)


def default_store() -> Any:
    """Return the key-value store of the default process group: a ``torch.distributed.Store``.

    ``init_process_group`` makes the store that torchrun's environment describes, and keeps it.
    A second ``TCPStore`` would need a port of its own on the main process's machine.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def before_cuda_initialises(action: Callable[[], None]) -> None:
    """Call `action` before torch initialises CUDA.

    torch can say that CUDA is initialised, but not who did it, and has no public hook.
    """
    import torch

    initialise = torch.cuda._lazy_init

    def watched() -> None:
        action()
        initialise()  # type: ignore[no-untyped-call]

    torch.cuda._lazy_init = watched
