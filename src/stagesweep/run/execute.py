"""Executes one composed config, in this process or in several. Imports no torch."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from stagesweep.base.errors import Lost
from stagesweep.config.nodes import hardware_settings
from stagesweep.hardware import detection
from stagesweep.parallel import launch
from stagesweep.run import processes, result
from stagesweep.run.plan import plan
from stagesweep.run.runner import Objective, run_stages


def execute(cfg: DictConfig) -> Objective:
    """Execute a config in Hydra's output folder; return the value of its objective.

    Always writes ``result.json`` there. Returns a list of values when ``objective.metric`` is a
    list, None when the run was pruned. Raises UserError for errors that the user can fix,
    Interrupted (exit status 130, 138 or 143) after a signal.
    """
    settings = hardware_settings(cfg)
    detection.set_visible_gpus(settings)
    planned = plan(cfg, settings)
    if not planned.all_stored and (count := launch.processes_to_start(settings)) > 1:
        try:
            return processes.run_in_processes(cfg, planned.fingerprints, count)
        except Lost as error:  # the main process may have been killed before it wrote the result
            result.mark_failed(Path(HydraConfig.get().runtime.output_dir), str(error))
            raise
    with launch.process_group_led():
        return run_stages(cfg, planned.fingerprints)
