"""Jobs of submitit: on Slurm, or as processes of this machine."""

import os
from importlib import import_module
from typing import Any

from stagesweep.sweep.engine.file_backend import FileBackend

# The parameters of a job that every executor of submitit has; others carry its name as a prefix.
COMMON = {
    "cpus_per_task",
    "gpus_per_node",
    "mem_gb",
    "name",
    "nodes",
    "stderr_to_stdout",
    "tasks_per_node",
    "timeout_min",
}


def submitit_backend(launcher: Any) -> FileBackend:
    """The backend of ``hydra/launcher=submitit_slurm`` or ``submitit_local``.

    The executor is made as Hydra's launcher makes it: some parameters are the executor's, the
    others are those of each job.
    """
    import submitit

    plugin = import_module(type(launcher).__module__)
    cluster = "slurm" if isinstance(launcher, plugin.SlurmLauncher) else "local"
    params = dict(launcher.params)
    folder = params.pop("submitit_folder")
    own = {
        f"{cluster}_{key}": params.pop(key)
        for key in ("max_num_timeout", "python")
        if key in params
    }
    executor = submitit.AutoExecutor(folder, cluster=cluster, **own)
    executor.update_parameters(
        **{key if key in COMMON else f"{cluster}_{key}": value for key, value in params.items()}
    )
    cores = (os.cpu_count() or 1) // (params.get("cpus_per_task") or 1)
    slots = int(params.get("array_parallelism") or cores or 1)
    return FileBackend(launcher, executor.submit, slots)
