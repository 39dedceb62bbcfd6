"""The task of a fit, which the main process sends to the other processes of its run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from stagesweep.base import trial
from stagesweep.base.spec import Spec
from stagesweep.base.view import View
from stagesweep.config import schema
from stagesweep.core.fit import Loop
from stagesweep.hardware.profile import HardwareProfile
from stagesweep.parallel.process_group import current_group
from stagesweep.tracking.metric_log import MetricLog


@dataclass
class FitTask:
    """All that a process needs to take part in a fit: the config, the model and the loss terms
    with their weights, the settings.
    """

    cfg: DictConfig
    model: nn.Module
    terms: dict[str, nn.Module]
    settings: schema.Fit
    seed: int
    # <experiment>/<stage>, by which a profile may bound the micro-batch.
    stage: str
    # Name of the fit: the stage's, or one of several in that stage.
    name: str
    # Folder of the checkpoints. With a sharded model every process writes to it.
    folder: Path
    spec: Spec
    # Views `train` and `val`; None: each process reads the data of the run itself.
    views: Mapping[str, View] | None

    def loop(self, views: Mapping[str, View], profile: HardwareProfile, rows: MetricLog) -> Loop:
        """The loop of this process over these views, which are ready for its device."""
        return Loop(
            model=self.model,
            terms=self.terms,
            settings=self.settings,
            views=dict(views),
            spec=self.spec,
            hardware=profile,
            seed=self.seed,
            folder=self.folder,
            rows=rows,
            trial=trial.current() if current_group().is_main else None,
            group=current_group(),
        )
