"""The study of a sweep: proposes trials, and records how they end.

The controller is the study's only writer. Each trial is on disk before it runs, so that a sweep
that was killed at any moment continues with the same trials.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml
from omegaconf import DictConfig
from optuna.distributions import check_distribution_compatibility
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from stagesweep.base.errors import UserError
from stagesweep.config.schema import Mode, Search
from stagesweep.sweep.space.parameter import describe
from stagesweep.sweep.space.space import Space
from stagesweep.sweep.study import manifest
from stagesweep.sweep.study.controllers import Coordinator
from stagesweep.sweep.study.sampling import SamplerFactory
from stagesweep.sweep.study.states import Outcome, combine_repeats, forget_failures
from stagesweep.sweep.study.storage import SingleWriterStorage, study_read

log = logging.getLogger(__name__)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass
class Trial:
    """A running trial: its number in the study, and its overrides."""

    number: int
    overrides: list[str]
    begun: float = 0.0
    retries: int = 0
    # Whether the pruner stopped it before its last repeat.
    pruned: bool = False


class Study:
    """The study in a sweep's folder, loaded or created."""

    def __init__(
        self,
        folder: Path,
        sweeper: DictConfig,
        settings: Search,
        space: Space,
        grid: list[dict[str, Any]] | None,
        pruner: Any,
        modes: Sequence[Mode],
        coordinator: Coordinator,
    ) -> None:
        self.folder, self.settings, self.space, self.pruner = folder, settings, space, pruner
        self.coordinator = coordinator
        self.samplers = SamplerFactory(sweeper.sampler, space)
        if settings.retry_failed:
            for number in coordinator.reopen_failed(sweeper.study_name):
                forget_failures(folder / str(number))
        sampler = None if grid is not None else self.samplers.create(0)
        with study_read(coordinator.url):
            self.storage = coordinator.open_storage()
            self.optuna = optuna.create_study(
                study_name=sweeper.study_name,
                storage=self.storage,
                sampler=sampler,
                pruner=pruner,
                directions=[StudyDirection[f"{mode}imize".upper()] for mode in modes],
                load_if_exists=True,
            )
        self._study_id = self.storage.get_study_id_from_name(self.optuna.study_name)
        # The points of a grid in order, by their overrides.
        self.grid = None if grid is None else {space.key(point): point for point in grid}
        self.total = settings.n_trials
        if self.grid is not None:
            self.total = min(self.total, len(self.grid))
        check_compatible(self.optuna, modes, space)
        for named in settings.enqueue:
            self.optuna.enqueue_trial(space.point(named), skip_if_exists=True)
        # The numbers of trials by overrides. Only the first runs; the others get its result.
        self.duplicates: dict[tuple[str, ...], list[int]] = {}
        # The trials that this controller runs, or has run.
        self.own: set[int] = set()
        self.refresh()

    def refresh(self) -> None:
        """Look for trials of other controllers."""
        self.duplicates.clear()
        for trial in self.trials():
            if (overrides := trial.user_attrs.get("overrides")) is not None:
                self.duplicates.setdefault(tuple(overrides), []).append(trial.number)

    def trials(self) -> list[FrozenTrial]:
        """All trials but those that wait in the queue, by number."""
        found = self.optuna.get_trials(deepcopy=False)
        return [trial for trial in found if trial.state is not TrialState.WAITING]

    # ------------------------------------------------------------------ proposing

    def lock(self) -> AbstractContextManager[None]:
        """Hold the lock that only one controller of this study has at a time."""
        return self.coordinator.lock(self.optuna.study_name)

    def _transaction(self) -> AbstractContextManager[Any]:
        """Write all changes of the block at once, where this is the only writer."""
        if isinstance(self.storage, SingleWriterStorage):
            return self.storage.transaction()
        return nullcontext()

    def running(self) -> list[FrozenTrial]:
        """The running trials of all controllers."""
        return [trial for trial in self.trials() if trial.state is TrialState.RUNNING]

    def unfinished(self) -> Iterator[Trial]:
        """Take over the running trials whose controller is dead."""
        alive = self.coordinator.live_controllers(self.optuna)
        alive -= {self.coordinator.controller_id}
        for frozen in self.running():
            if frozen.number not in self.own and frozen.user_attrs.get("owner") not in alive:
                trial = self._adopt(optuna.trial.Trial(self.optuna, self._id(frozen.number)))
                trial.retries = int(frozen.user_attrs.get("retries", 0))
                yield trial

    @property
    def finished(self) -> bool:
        """Whether all trials have ended."""
        return len(self.trials()) >= self.total and not self.running()

    def taken_over(self) -> list[int]:
        """The trials of this controller that another one has taken over."""
        others = {trial.number for trial in self.running() if not self.owns(trial.number)}
        found = sorted(self.own & others)
        self.own -= others
        return found

    def owns(self, number: int) -> bool:
        """Whether a trial belongs to this controller."""
        owner = self.frozen_trial(number).user_attrs.get("owner", self.coordinator.controller_id)
        return not self.coordinator.shared or bool(owner == self.coordinator.controller_id)

    def ask(self) -> Trial | None:
        """Propose the next trial; None when the study has all of them."""
        if not self.coordinator.shared:
            with self._transaction():
                return self._next()
        with self.lock():
            self.refresh()
            return next(self.unfinished(), None) or self._next()

    def _next(self) -> Trial | None:
        begun = self.trials()
        if len(begun) >= self.total:
            return None
        queued = len(self.optuna.get_trials(deepcopy=False)) > len(begun)
        if self.grid is not None and not queued:
            rest = (point for key, point in self.grid.items() if key not in self.duplicates)
            return None if (point := next(rest, None)) is None else self._create(point)
        if self.samplers.per_trial and self.grid is None:
            if self.samplers.redraws and not queued:
                directions = self.optuna.directions
                point = self.samplers.draw_new(begun, directions, self._is_known)
                if point is not None:
                    return self._create(point)
            self.optuna.sampler = self.samplers.create(len(begun))
        return self._adopt(self.optuna.ask())

    def _create(self, point: dict[str, Any]) -> Trial:
        """Create a trial of a given point, with one write instead of one for each parameter."""
        fixed = optuna.trial.FixedTrial(point)
        overrides = self.space.suggest(fixed)
        template = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=fixed.params,
            distributions=fixed.distributions,
            user_attrs={"overrides": overrides, **self._owner()},
        )
        trial_id = self.storage.create_new_trial(self._study_id, template)
        return self._register(self.storage.get_trial_number_from_id(trial_id), overrides)

    def _is_known(self, overrides: list[str]) -> bool:
        return tuple(overrides) in self.duplicates

    def _adopt(self, trial: optuna.trial.Trial) -> Trial:
        """Complete the parameters of a trial of Optuna, and make it this controller's."""
        known = trial.user_attrs.get("overrides")
        overrides = list(known) if known is not None else self.space.suggest(trial)
        wanted = {"overrides": overrides} if known is None else {}
        for name, value in {**wanted, **self._owner()}.items():
            trial.set_user_attr(name, value)
        return self._register(trial.number, overrides)

    def _owner(self) -> dict[str, str]:
        """The attribute that names the controller of a trial, when there are several."""
        return {"owner": self.coordinator.controller_id} if self.coordinator.shared else {}

    def _register(self, number: int, overrides: list[str]) -> Trial:
        """Remember a trial as this controller's."""
        self.own.add(number)
        same = self.duplicates.setdefault(tuple(overrides), [])
        if number not in same:
            same.append(number)
        return Trial(number, overrides)

    def first(self, trial: Trial) -> int:
        """The number of the first trial with the same overrides."""
        return self.duplicates[tuple(trial.overrides)][0]

    # ------------------------------------------------------------------ recording

    def report(self, number: int, value: float, step: int) -> bool:
        """Record a trial's value after a step. Returns whether it should stop."""
        trial = optuna.trial.Trial(self.optuna, self._id(number))
        if step not in self.frozen_trial(number).intermediate_values:
            trial.report(value, step)
        return trial.should_prune()

    def set_attrs(self, number: int, **attributes: Any) -> None:
        """Set user attributes of a trial."""
        for name, value in attributes.items():
            self.storage.set_trial_user_attr(self._id(number), name, value)

    def tell(
        self,
        trial: Trial,
        outcomes: list[Outcome],
        over: Mapping[str, float] | None = None,
        **attributes: Any,
    ) -> Outcome:
        """Record the end of a trial and of its duplicates. Returns the outcome.

        The value of repeats is their mean. If one failed, the trial failed. ``over`` is the excess
        of the trial over each bound of ``search.constraints``.
        """
        with self.lock():
            if self.coordinator.shared:
                self.refresh()
            with self._transaction():
                return self._tell(trial, outcomes, over or {}, attributes)

    def _tell(
        self,
        trial: Trial,
        outcomes: list[Outcome],
        over: Mapping[str, float],
        attributes: dict[str, Any],
    ) -> Outcome:
        outcome = combine_repeats(outcomes)
        running = self.frozen_trial(trial.number).state is TrialState.RUNNING
        if running and not self.owns(trial.number):
            return outcome  # another controller has taken it over, and records its end
        if len(outcomes) > 1 and outcome.state == "complete":
            attributes["values"] = [each.value for each in outcomes]
        if outcome.reason is not None:
            attributes |= {"reason": outcome.reason, "message": outcome.message}
        states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
        state = states.get(outcome.state, TrialState.FAIL)
        values = outcome.value if state is TrialState.COMPLETE else None
        first, *others = self.duplicates[tuple(trial.overrides)]
        for number in (first, *others):
            if self.frozen_trial(number).state is TrialState.RUNNING:
                same = {"same_as": first} if number != first else {}
                self.set_attrs(number, **attributes, **same)
                told = optuna.trial.Trial(self.optuna, self._id(number))
                original = self.frozen_trial(first)
                for step, value in original.intermediate_values.items() if same else ():
                    told.report(value, step)
                bounded = original.constraints if same else over
                for name in bounded.keys() - told.constraints.keys():
                    if not math.isnan(bounded[name]):
                        told.set_constraint(name, bounded[name])
                self.optuna.tell(number, values, state)
        return outcome

    def repeated_failure(self, count: int) -> FrozenTrial | None:
        """The latest trial, if none has succeeded and the latest ``count`` failed alike."""
        ended = [t for t in self.trials() if t.state.is_finished()]
        if any(trial.state is not TrialState.FAIL for trial in ended):
            return None
        own = [trial for trial in ended if "same_as" not in trial.user_attrs]
        own.sort(key=lambda trial: (trial.datetime_complete, trial.number))
        latest = own[-count:] if count else []
        errors = {
            (
                trial.user_attrs.get("reason"),
                # An error may name the folder of its trial.
                str(trial.user_attrs.get("message")).replace(
                    str(self.folder / str(trial.number)), str(self.folder)
                ),
            )
            for trial in latest
        }
        return latest[-1] if latest and len(latest) == count and len(errors) == 1 else None

    def has_found(self, path: str) -> bool:
        """Whether the sweep found a file, which is missing now.

        It did if the file was there when the sweep began, or if a complete trial read it.
        A folder stands for its files while it is missing.
        """
        file = Path(path).absolute()
        missing = [file, *(folder for folder in file.parents if not folder.exists())]
        began = manifest.read(self.folder) or {}
        if any(Path(each).absolute() in missing for each in began.get("files") or ()):
            return True
        complete = [t.number for t in self.trials() if t.state is TrialState.COMPLETE]
        for number in complete:
            for config in (self.folder / str(number)).glob("**/config.yaml"):
                with suppress(OSError, ValueError, yaml.YAMLError):
                    text = config.read_text()
                    if not any(each.name in text for each in missing):
                        continue
                    values = manifest.flat(yaml.safe_load(text)).values()
                    if any(isinstance(v, str) and Path(v).absolute() in missing for v in values):
                        return True
        return False

    def outcome_of(self, number: int) -> Outcome | None:
        """The recorded outcome of a trial. None while it is running."""
        frozen = self.frozen_trial(number)
        attributes = frozen.user_attrs
        match frozen.state:
            case TrialState.COMPLETE:
                values = frozen.values or []
                return Outcome("complete", values[0] if len(values) == 1 else values)
            case TrialState.PRUNED:
                return Outcome("pruned")
            case TrialState.FAIL:
                why = attributes.get("reason", "error"), attributes.get("message", "")
                return Outcome("failed", None, *why)
        return None

    def frozen_trial(self, number: int) -> FrozenTrial:
        """The recorded state of a trial."""
        return self.storage.get_trial(self._id(number))

    def _id(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self._study_id, number)


def check_compatible(study: optuna.Study, modes: Sequence[Mode], space: Space) -> None:
    """Raise UserError when a study has other directions, or other kinds of parameters."""
    was = [direction.name.lower() for direction in study.directions]
    if (now := [f"{mode}imize" for mode in modes]) != was:
        raise UserError(
            f"one study cannot {' and '.join(was)} and then {' and '.join(now)}; set "
            "sweep.on_change=new, or another search.study"
        )
    distributions = space.distributions
    trials = study.get_trials(deepcopy=False)
    before = {k: v for trial in trials for k, v in trial.distributions.items()}
    for name in before.keys() & distributions.keys():
        try:
            check_distribution_compatibility(before[name], distributions[name])
        except ValueError as error:
            raise UserError(
                f"{name}: one study cannot hold both {describe(before[name])} and "
                f"{describe(distributions[name])}; set sweep.on_change=new, or another search.study"
            ) from error
