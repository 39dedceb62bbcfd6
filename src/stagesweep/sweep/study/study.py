"""The study of a sweep: what was proposed, how it went, and what comes next.

The controller is the study's only writer. Every point that is proposed is on disk before it runs,
so that a sweep that was ended at any moment goes on with the same trials.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import FloatDistribution, check_distribution_compatibility
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from stagesweep.base.errors import UserError
from stagesweep.config.schema import Mode, Search
from stagesweep.sweep.space.space import Space, describe
from stagesweep.sweep.study.controllers import Sharing
from stagesweep.sweep.study.states import Outcome, together

log = logging.getLogger(__name__)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
optuna.logging.set_verbosity(optuna.logging.WARNING)

# How often a point that was proposed before is drawn again.
DRAWS = 20


@dataclass
class Trial:
    """A proposed point: its number in the study, and the overrides that make it."""

    number: int
    overrides: list[str]
    begun: float = 0.0
    retries: int = 0
    # Whether it was ended with repeats still to run.
    pruned: bool = False


class Study:
    """The study in a sweep's folder, opened or begun."""

    def __init__(
        self,
        folder: Path,
        sweeper: DictConfig,
        settings: Search,
        space: Space,
        grid: list[dict[str, Any]] | None,
        pruner: Any,
        modes: Sequence[Mode],
        sharing: Sharing,
    ) -> None:
        self.folder, self.settings, self.space, self.pruner = folder, settings, space, pruner
        self.sharing = sharing
        # Plain: of a node, Hydra would copy the config around it for each trial.
        self.sampler_config: Any = OmegaConf.to_object(sweeper.sampler)
        target = str(sweeper.sampler.get("_target_", ""))
        self.optuna = optuna.create_study(
            study_name=sweeper.study_name,
            storage=sharing.storage(),
            sampler=None if grid is not None else self.sampler(0),
            pruner=pruner,
            directions=[StudyDirection[f"{mode}imize".upper()] for mode in modes],
            load_if_exists=True,
        )
        # A grid is a list of points, taken in order; here by the overrides that they are.
        self.grid = None if grid is None else {space.key(point): point for point in grid}
        # Only this one goes on by itself where another process has stopped.
        self.reseed = not target.endswith("QMCSampler")
        # A discrete space has points that are proposed again; such a draw is made once more. (A
        # generation of a genetic search may repeat a point, and a Gaussian process takes its time.)
        discrete = all(
            not isinstance(each, FloatDistribution) or each.step is not None
            for each in space.distributions.values()
        )
        self.redraws = discrete and target.endswith(("TPESampler", "RandomSampler"))
        self.total = settings.n_trials
        if self.grid is not None:
            self.total = min(self.total, len(self.grid))
        self.check_compatible(modes)
        for named in settings.enqueue:
            self.optuna.enqueue_trial(space.point(named), skip_if_exists=True)
        # The trials that have each set of overrides: the first runs, the others are told its value.
        self.same: dict[tuple[str, ...], list[int]] = {}
        # Those that this controller runs, or has run.
        self.mine: set[int] = set()
        self.refresh()

    def refresh(self) -> None:
        """Take in what is in the study, by whichever controller."""
        self.same.clear()
        for trial in self.trials():
            if (overrides := trial.user_attrs.get("overrides")) is not None:
                self.same.setdefault(tuple(overrides), []).append(trial.number)

    def check_compatible(self, modes: Sequence[Mode]) -> None:
        """UserError when what is to be proposed cannot stand beside what was."""
        was = [direction.name.lower() for direction in self.optuna.directions]
        if (now := [f"{mode}imize" for mode in modes]) != was:
            raise UserError(
                f"one study cannot {' and '.join(was)} and then {' and '.join(now)}; set "
                "sweep.on_change=new, or another search.study"
            )
        space = self.space.distributions
        before = {k: v for trial in self.trials() for k, v in trial.distributions.items()}
        for name in before.keys() & space.keys():
            try:
                check_distribution_compatibility(before[name], space[name])
            except ValueError as error:
                raise UserError(
                    f"{name}: one study cannot hold both {describe(before[name])} and "
                    f"{describe(space[name])}; set sweep.on_change=new, or another search.study"
                ) from error

    def trials(self) -> list[FrozenTrial]:
        """Every trial that was begun, by number."""
        found = self.optuna.get_trials(deepcopy=False)
        return [trial for trial in found if trial.state is not TrialState.WAITING]

    def sampler(self, number: int) -> BaseSampler:
        """The sampler of a trial. Its seed follows from the trial's number alone, so that a sweep
        that was interrupted proposes what it would have proposed without.
        """
        given: dict[str, Any] = {}
        if (seed := self.sampler_config.get("seed")) is not None:
            given["seed"] = (int(seed) + 1_000_003 * number) % 2**32
        made: BaseSampler = instantiate(
            self.sampler_config,
            **given,
            _execution_whitelist_=("hydra_plugins.hydra_optuna_sweeper.*", "optuna.*"),
        )
        return made

    # ------------------------------------------------------------------ proposing

    def alone(self) -> AbstractContextManager[None]:
        """A block that no other controller of this study is in at the same time."""
        return self.sharing.alone(self.optuna.study_name)

    def running(self) -> list[FrozenTrial]:
        """The trials under way, whoever runs them."""
        return [trial for trial in self.trials() if trial.state is TrialState.RUNNING]

    def unfinished(self) -> Iterator[Trial]:
        """The trials under way that no living controller looks after; now this one does."""
        living = self.sharing.living(self.optuna) - {self.sharing.me}
        for frozen in self.running():
            if frozen.number not in self.mine and frozen.user_attrs.get("owner") not in living:
                trial = self._proposed(optuna.trial.Trial(self.optuna, frozen._trial_id))
                trial.retries = int(frozen.user_attrs.get("retries", 0))
                yield trial

    @property
    def over(self) -> bool:
        """Whether nothing is left to run."""
        return len(self.trials()) >= self.total and not self.running()

    def lost(self) -> list[int]:
        """The trials of this controller that another has taken over."""
        others = {trial.number for trial in self.running() if not self.owns(trial.number)}
        lost = sorted(self.mine & others)
        self.mine -= others
        return lost

    def owns(self, number: int) -> bool:
        """Whether this controller looks after a trial."""
        owner = self.frozen(number).user_attrs.get("owner", self.sharing.me)
        return not self.sharing.shared or bool(owner == self.sharing.me)

    def ask(self) -> Trial | None:
        """The next point; None when there are as many as there should be."""
        if not self.sharing.shared:
            with self.sharing.at_once(self.optuna):
                return self._next()
        with self.alone():
            self.refresh()
            return next(self.unfinished(), None) or self._next()

    def _next(self) -> Trial | None:
        begun = self.trials()
        if len(begun) >= self.total:
            return None
        named = len(self.optuna.get_trials(deepcopy=False)) > len(begun)
        if self.grid is not None and not named:
            rest = (point for key, point in self.grid.items() if key not in self.same)
            return None if (point := next(rest, None)) is None else self._given(point)
        if self.reseed and self.grid is None:
            if self.redraws and not named and (unseen := self.unseen(begun)) is not None:
                return self._given(unseen)
            self.optuna.sampler = self.sampler(len(begun))
        return self._proposed(self.optuna.ask())

    def _given(self, point: dict[str, Any]) -> Trial:
        """A new trial of a point that is known: one write, where a question and an answer for each
        parameter would be many.
        """
        fixed = optuna.trial.FixedTrial(point)
        overrides = self.space.suggest(fixed)
        template = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=fixed.params,
            distributions=fixed.distributions,
            user_attrs={"overrides": overrides, **self._owner()},
        )
        storage = self.optuna._storage
        number = storage.create_new_trial(self.optuna._study_id, template)
        return self._mine(storage.get_trial_number_from_id(number), overrides)

    def unseen(self, begun: list[FrozenTrial]) -> dict[str, Any] | None:
        """A point that no trial has, where a few draws find one.

        They are draws in a copy of the study, where each counts as under way: the next one is led
        away from it, and the study itself has no trial for a repetition.
        """
        sampler = self.sampler(len(begun))
        copy = optuna.create_study(sampler=sampler, directions=self.optuna.directions)
        copy.add_trials(begun)
        for _ in range(DRAWS):
            trial = copy.ask()
            if tuple(self.space.suggest(trial)) not in self.same:
                return trial.params
        return None

    def _proposed(self, trial: optuna.trial.Trial) -> Trial:
        known = trial.user_attrs.get("overrides")
        overrides = list(known) if known is not None else self.space.suggest(trial)
        wanted = {"overrides": overrides} if known is None else {}
        for name, value in {**wanted, **self._owner()}.items():
            trial.set_user_attr(name, value)
        return self._mine(trial.number, overrides)

    def _owner(self) -> dict[str, str]:
        """The note in a trial that says who runs it, where it could be another."""
        return {"owner": self.sharing.me} if self.sharing.shared else {}

    def _mine(self, number: int, overrides: list[str]) -> Trial:
        """A trial that this controller runs."""
        self.mine.add(number)
        same = self.same.setdefault(tuple(overrides), [])
        if number not in same:
            same.append(number)
        return Trial(number, overrides)

    def first(self, trial: Trial) -> int:
        """The number of the first trial with the same overrides."""
        return self.same[tuple(trial.overrides)][0]

    # ------------------------------------------------------------------ recording

    def report(self, number: int, value: float, step: int) -> bool:
        """Record a trial's value after a step; whether it should stop there."""
        trial = optuna.trial.Trial(self.optuna, self._id(number))
        if step not in self.frozen(number).intermediate_values:
            trial.report(value, step)
        return trial.should_prune()

    def note(self, number: int, **attributes: Any) -> None:
        """Record something about a trial."""
        for name, value in attributes.items():
            self.optuna._storage.set_trial_user_attr(self._id(number), name, value)

    def tell(
        self,
        trial: Trial,
        outcomes: list[Outcome],
        over: Mapping[str, float] | None = None,
        **attributes: Any,
    ) -> Outcome:
        """Record the end of a trial, and of those that propose the same; returns how it ended.

        The value of repeats is their mean; one that failed is the failure of all. ``over`` says how
        far the trial is above each bound of ``search.constraints``.
        """
        with self.alone():
            if self.sharing.shared:
                self.refresh()
            with self.sharing.at_once(self.optuna):
                return self._tell(trial, outcomes, over or {}, attributes)

    def _tell(
        self,
        trial: Trial,
        outcomes: list[Outcome],
        over: Mapping[str, float],
        attributes: dict[str, Any],
    ) -> Outcome:
        outcome = together(outcomes)
        running = self.frozen(trial.number).state is TrialState.RUNNING
        if running and not self.owns(trial.number):
            return outcome  # it is another controller's now, which will tell
        if len(outcomes) > 1 and outcome.state == "complete":
            attributes["values"] = [each.value for each in outcomes]
        if outcome.reason is not None:
            attributes |= {"reason": outcome.reason, "message": outcome.message}
        states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
        state = states.get(outcome.state, TrialState.FAIL)
        values = outcome.value if state is TrialState.COMPLETE else None
        first, *others = self.same[tuple(trial.overrides)]
        for number in (first, *others):
            if self.frozen(number).state is TrialState.RUNNING:
                same = {"same_as": first} if number != first else {}
                self.note(number, **attributes, **same)
                told = optuna.trial.Trial(self.optuna, self._id(number))
                for step, value in self.frozen(first).intermediate_values.items() if same else ():
                    told.report(value, step)
                bounded = self.frozen(first).constraints if same else over
                for name in bounded.keys() - told.constraints.keys():
                    if not math.isnan(bounded[name]):
                        told.set_constraint(name, bounded[name])
                self.optuna.tell(number, values, state)
        return outcome

    def told(self, number: int) -> Outcome | None:
        """How a trial ended; None when it did not yet."""
        frozen = self.frozen(number)
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

    def frozen(self, number: int) -> FrozenTrial:
        """A trial as it is on disk."""
        return self.optuna._storage.get_trial(self._id(number))

    def _id(self, number: int) -> int:
        return self.optuna._storage.get_trial_id_from_study_id_trial_number(
            self.optuna._study_id, number
        )
