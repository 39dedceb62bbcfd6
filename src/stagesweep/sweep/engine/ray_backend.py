"""Tasks of Ray: on a cluster, or on this machine."""

from collections.abc import Callable
from functools import partial
from typing import Any

from omegaconf import OmegaConf

from stagesweep.sweep.engine.file_backend import FileBackend


def ray_backend(launcher: Any) -> FileBackend:
    """The backend of ``hydra/launcher=ray``; starts a local cluster if none is running."""
    import ray

    settings: Any = OmegaConf.to_container(launcher.ray_cfg, resolve=True)
    init, options = settings["init"], settings["remote"]
    if not ray.is_initialized():
        # A local cluster needs no dashboard.
        local = {} if init.get("address") else {"include_dashboard": False}
        ray.init(**{"log_to_driver": False, **local, **init})
    slots = int(ray.cluster_resources().get("CPU", 1) // (options.get("num_cpus") or 1))
    return FileBackend(launcher, partial(RayTask, options), max(1, slots))


class RayTask:
    """A submitted task, with the methods of `file_backend.Handle`."""

    def __init__(
        self, options: dict[str, Any], function: Callable[..., Any], *arguments: Any
    ) -> None:
        import ray

        # Each task runs in a process of its own, and the controller does the retries.
        self.ray: Any = ray
        remote = ray.remote(max_calls=1, max_retries=0, **options)(function)
        self.reference = remote.remote(*arguments)

    def done(self) -> bool:
        """Whether the task has ended."""
        return bool(self.ray.wait([self.reference], timeout=0)[0])

    def result(self) -> Any:
        """What the function returned; raises if its process was killed."""
        return self.ray.get(self.reference)

    def cancel(self) -> object:
        """Kill the task."""
        return self.ray.cancel(self.reference, force=True)
