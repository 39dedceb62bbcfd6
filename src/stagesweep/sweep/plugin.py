"""The sweeper and the launcher that Hydra finds. Imports neither torch nor Optuna: Hydra loads
this for every command.
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

if TYPE_CHECKING:
    from stagesweep.sweep.engine.slots import Slots


class StudySweeper(Sweeper):
    """A sweep is an Optuna study: resumed by the same command, one process writes it."""

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
        """Remember what a sweep needs."""
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the sweep to its end."""
        from stagesweep.sweep.engine.controller import sweep

        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise UserError("a sweep is not for torchrun: set hardware.devices, and leave it out")
        assert self.config is not None
        assert self.launcher is not None
        sweep(self.config, self.settings, self.launcher, arguments)


class SlotsLauncher(Launcher):
    """Runs trials on this machine, several at once, each in a process of its own."""

    def __init__(self, slots: str | int) -> None:
        self.slots = slots

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Remember what a process needs."""
        self.config, self.hydra_context, self.task = config, hydra_context, task_function

    def open(self) -> "Slots":
        """The slots, for a sweeper that fills each as soon as it is free."""
        from stagesweep.config.access import hardware
        from stagesweep.hardware import environment
        from stagesweep.sweep.engine.slots import Slots, leases

        settings = hardware(self.config)
        environment.set_variables(settings)  # of the server that trials are forked from
        given = leases(self.slots, settings)
        return Slots(given, self.hydra_context, self.config, self.task)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run all and wait, for any other sweeper."""
        from stagesweep.sweep.engine.slots import Ended, Job

        slots = self.open()
        numbered = enumerate(job_overrides, initial_job_idx)
        jobs = [Job(number, str(number), list(given)) for number, given in numbered]
        waiting, returns = list(jobs), {}
        while waiting or slots.running:
            while waiting and slots.free:
                slots.start(waiting.pop(0))
            for event in slots.wait():
                if isinstance(event, Ended):
                    returned = JobReturn(overrides=event.job.overrides)
                    done = event.outcome.state == "complete"
                    returned.return_value = (
                        event.outcome.value if done else UserError(event.outcome.message)
                    )
                    returned.status = JobStatus.COMPLETED if done else JobStatus.FAILED
                    returns[event.job.number] = returned
        return [returns[job.number] for job in jobs]
