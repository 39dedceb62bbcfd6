"""Executes one composed config, in this process or in several. Imports no torch."""

import re
import shutil
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from stagesweep.base.errors import Lost, UserError
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
    hydra = HydraConfig.get()
    if hydra.mode is RunMode.RUN:
        refuse_foreign(Path(hydra.runtime.output_dir), hydra.output_subdir)
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


def refuse_foreign(folder: Path, hydras: str | None) -> None:
    """Raise UserError if a folder has files, and none of them is of an earlier run.

    ``hydras`` is the folder in it that Hydra has just written, as well as an empty log.
    """
    names = sorted(
        path.name for path in folder.iterdir() if path.name != hydras and path.suffix != ".log"
    )
    if not names or is_run(folder):
        return
    if hydras:
        shutil.rmtree(folder / hydras, ignore_errors=True)
    if (log := folder / "run.log").exists() and not log.stat().st_size:
        log.unlink()
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    raise UserError(
        f"{folder} has files of its own ({names[0]}{more}); name a new folder, or that of an "
        "earlier run, with hydra.run.dir=<folder>"
    )


def is_run(folder: Path) -> bool:
    """Whether a run has written its config into a folder."""
    try:
        text = (folder / "config.yaml").read_text()
    except (OSError, UnicodeDecodeError):
        return False
    return {"experiment", "stage", "objective"} <= set(re.findall(r"^(\w+):", text, re.MULTILINE))
