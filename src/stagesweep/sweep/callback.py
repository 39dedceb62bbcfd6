"""What happens around a sweep: checks before its first trial, tables after its last."""

import sys
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from stagesweep.errors import UserError


class Results(Callback):
    """Refuses a sweep that cannot work, and sums up the trials of one that ran, however it ended.

    Hydra turns exceptions of a callback into warnings, hence SystemExit.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.faults: dict[Path, str] = {}

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check what all trials share, and make the folder of the sweep."""
        folder = Path(config.hydra.sweep.dir)
        if folder.exists() and any(folder.iterdir()):
            refuse(
                f"{folder} holds results already; give this sweep a name of its own with "
                "search.study=<name> (finished stages are not trained again)"
            )
        refuse_unready(config)
        if config.hydra.runtime.choices.search != "grid" and not swept(config):
            refuse(
                "nothing to search; choose search/space=<name>, or sweep a key: "
                "'stage.<name>.optimizer.lr=interval(1e-4, 1e-2)'"
            )
        check_space(config)
        check(config)
        settle_optuna()
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        # Each trial is composed anew: its folder stays here, even when the experiment is swept.
        quoted = str(folder).replace("'", r"\'")
        with read_write(config.hydra):
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Remember why a trial failed, in case it could not write a result."""
        error = job_return._return_value
        if isinstance(error, Exception):
            self.faults[Path(config.hydra.runtime.output_dir)] = str(error) or repr(error)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Write the tables, and print what a person wants to know first."""
        if self.folder is None:
            return
        from stagesweep.files import atomic_text
        from stagesweep.sweep import report, results

        parameters = swept(config)
        trials = results.summarise(self.folder, config.objective.metric, parameters, self.faults)
        atomic_text(self.folder / "results_summary.csv", trials.to_csv(index=False))
        report.at_the_end(self.folder)
        best = results.ranked(trials, config.objective.mode)
        if best.empty:
            if len(trials) and not isinstance(sys.exception(), SystemExit | KeyboardInterrupt):
                refuse(f"none of {len(trials)} trials finished; the first: {trials.reason[0]}")
            return
        print(f"\n{len(best)} of {len(trials)} trials finished; the best:\n")
        print(results.leaderboard(best, parameters))
        if parameters == ["seed"] and (table := results.over_seeds(trials)) is not None:
            atomic_text(self.folder / "comparison.csv", table.to_csv(index=False))
            print(f"\nMean ± half the 95 % interval over {len(best)} seeds:\n")
            print(results.with_intervals(table))
        print(where_to_look(self.folder, Path(best["dir"].iloc[0])))


def swept(config: DictConfig) -> list[str]:
    """The keys that differ between trials: the space's, and those swept on the command line."""
    overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    keys = {str(key): True for key in config.search.space}
    keys |= {o.get_key_element(): o.is_sweep_override() for o in overrides}
    return [key for key, differs in keys.items() if differs]


def refuse_unready(config: DictConfig) -> None:
    """Refuse what the sweeper in use cannot do, before it passes over it in silence."""
    ablation = config.search.ablation
    for key, asked in {
        "search.ablation": ablation.variants or ablation.leave_one_out,
        "search.zip": config.search.zip,
        "search.when": config.search.when,
        "search.pruner": config.search.pruner,
    }.items():
        if asked:
            refuse(f"{key} is set, but sweeps cannot do this yet; leave it out")


def check_space(config: DictConfig) -> None:
    """Refuse a space that cannot be searched, and a grid with too many points."""
    from stagesweep.sweep import space

    try:
        found = space.parse(config.search.space, list(config.hydra.overrides.task))
        if config.hydra.runtime.choices.search == "grid":
            found.points(config.search.max_points)
    except UserError as error:
        refuse(str(error))


def check(config: DictConfig) -> None:
    """Validate what the trials share; what is swept may still be open and is checked in each."""
    from stagesweep.validate import validate

    shared = config.copy()
    OmegaConf.set_readonly(shared, False)
    with open_dict(shared):
        del shared["hydra"]
    groups = set(config.hydra.runtime.choices)
    keys = swept(config)
    if any(k in groups or OmegaConf.is_missing(shared, k) for k in keys):
        return
    try:
        validate(shared)
    except UserError as error:
        refuse(str(error))


def where_to_look(folder: Path, best: Path) -> str:
    """The last lines of a sweep: paths and commands to copy."""
    lines = {
        "all trials": folder / "results_summary.csv",
        "best trial": best,
        "report": folder / "report.html",
        "curves": f"tensorboard --logdir {folder}",
    }
    figures = sorted(best.glob("stages/*/figures"))
    if figures:
        lines["figures"] = figures[-1]
    return "\n" + "\n".join(f"{name:<11} {place}" for name, place in lines.items())


def settle_optuna() -> None:
    """Make Optuna quiet, and let a grid end with a failed trial.

    At the last point of a grid Optuna asks its own loop to stop. The sweeper has no such loop (it
    counts the points itself), and misses the exception that this raises when that point failed.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    optuna.samplers.GridSampler.after_trial = lambda *_: None  # type: ignore[method-assign]


def refuse(line: str) -> NoReturn:
    """End the command with one line on stderr and status 1."""
    raise SystemExit(f"stagesweep: {line}")
