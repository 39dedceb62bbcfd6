"""The sweeper and the launcher that Hydra finds.

Hydra imports this module for every command, so it imports neither torch nor Optuna.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from stagesweep.base.errors import UserError
from stagesweep.config import options

if TYPE_CHECKING:
    from stagesweep.sweep.engine.slots import SlotBackend


class StudySweeper(Sweeper):
    """Runs a sweep as an Optuna study, which the same command continues."""

    def __init__(self, sampler: Any, storage: str, study_name: str) -> None:
        self.settings = OmegaConf.create(
            {
                "sampler": OmegaConf.to_container(sampler, resolve=True),
                "storage": storage,
                "study_name": study_name,
            }
        )

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep the config, and create the launcher."""
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the sweep until all trials have finished."""
        # Not at the top: it imports Optuna.
        from stagesweep.sweep.engine.controller import sweep

        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise UserError(
                "a sweep cannot run under torchrun: run it without, and set hardware.devices"
            )
        options.check_optional_groups()
        assert self.config is not None
        assert self.launcher is not None
        sweep(self.config, self.settings, self.launcher, arguments)


class SlotsLauncher(Launcher):
    """Runs jobs on this machine, several at once, each in a process of its own."""

    def __init__(self, slots: str | int) -> None:
        self.slots = slots

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep the config and the task."""
        self.config, self.hydra_context, self.task = config, hydra_context, task_function

    def open_backend(self) -> "SlotBackend":
        """The backend, for `StudySweeper`: it fills each slot as soon as it is free."""
        from stagesweep.config.nodes import hardware_settings
        from stagesweep.hardware import environment
        from stagesweep.sweep.engine.slots import SlotBackend, local_slots

        settings = hardware_settings(self.config)
        environment.set_variables(settings)  # the fork server inherits it
        slots = local_slots(self.slots, settings)
        return SlotBackend(slots, self.hydra_context, self.config, self.task)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run all jobs and wait for them, for any other sweeper."""
        from stagesweep.sweep.engine.job import Finished, Job

        backend = self.open_backend()
        numbered = enumerate(job_overrides, initial_job_idx)
        jobs = [Job(number, str(number), list(overrides)) for number, overrides in numbered]
        queue, returns = list(jobs), dict[int, JobReturn]()
        while queue or backend.busy:
            while queue and backend.free:
                backend.start(queue.pop(0))
            for event in backend.wait():
                if isinstance(event, Finished):
                    job, outcome = event.job, event.outcome
                    complete = outcome.state == "complete"
                    returned = JobReturn(overrides=job.overrides)
                    returned.return_value = (
                        outcome.value if complete else UserError(outcome.message)
                    )
                    returned.status = JobStatus.COMPLETED if complete else JobStatus.FAILED
                    returns[job.number] = returned
        return [returns[job.number] for job in jobs]
