"""The study of a sweep: what was proposed, how it went, and what comes next.

The controller is the study's only writer. Every point that is proposed is on disk before it runs,
so that a sweep that was ended at any moment goes on with the same trials.
"""

import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import yaml
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import FloatDistribution, check_distribution_compatibility
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from stagesweep.config import Mode, Search
from stagesweep.errors import NotFinite, UserError
from stagesweep.files import atomic_text
from stagesweep.sweep.job import Outcome
from stagesweep.sweep.sharing import Sharing
from stagesweep.sweep.space import Space, describe

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


def together(outcomes: list[Outcome]) -> Outcome:
    """The outcome of a trial, from those of its repeats."""
    checked = [finite(each) for each in outcomes]
    for each in checked:
        if each.state != "complete":
            return each
    if len(checked) == 1:
        return checked[0]
    values = [each.value for each in checked]
    if isinstance(values[0], list | tuple):
        return Outcome("complete", [fmean(column) for column in zip(*values, strict=True)])
    return Outcome("complete", fmean(values))


def finite(outcome: Outcome) -> Outcome:
    """A run that ended well without a number did not."""
    if outcome.state != "complete":
        return outcome
    value = outcome.value
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    if any(not isinstance(n, int | float) for n in numbers):
        return Outcome("failed", None, "error", f"the run returned {value!r} as its objective")
    if any(math.isnan(n) for n in numbers):
        return Outcome("failed", None, NotFinite.reason, f"its objective is {value}")
    return outcome


def on_disk(folder: Path) -> Outcome | None:
    """How the run in a folder ended, by its ``result.json``; None when it did not."""
    try:
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return None
    match result.get("status"):
        case "complete":
            objective = result.get("objective") or {}
            several = objective if isinstance(objective, list) else [objective]
            values = [math.nan if (v := each.get("value")) is None else v for each in several]
            return Outcome("complete", values if isinstance(objective, list) else values[0])
        case "pruned":
            return Outcome("pruned")
    return None


# ------------------------------------------------------------------ what a sweep was begun with


def record(folder: Path, about: Mapping[str, Any]) -> None:
    """Write down what a sweep is begun with."""
    atomic_text(folder / "sweep.yaml", yaml.safe_dump(dict(about), sort_keys=False))


def recorded(folder: Path) -> dict[str, Any] | None:
    """What a sweep was begun with; None when it was not."""
    file = folder / "sweep.yaml"
    return yaml.safe_load(file.read_text()) if file.exists() else None


def changes(space: Space, now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Lines that say what is not as it was when the sweep was begun."""
    lines = [f"space {line}" for line in space.difference(before["space"])]
    old, new = flat(before["config"]), flat(now["config"])
    return lines + [
        f"{key}: was {old.get(key, 'absent')}, is {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested plain values by dotted key."""
    if not isinstance(value, dict) or not value:
        return {key: value}
    below = [flat(each, f"{key}.{name}" if key else str(name)) for name, each in value.items()]
    return {k: v for each in below for k, v in each.items()}


def plain(config: DictConfig) -> dict[str, Any]:
    """What all trials share, as plain values; interpolations of what is swept stay as they are."""
    from stagesweep.inputs import what_counts

    keys = ("seed", "init_from", "model", "data", "loss", "stage", "hardware", "objective")
    found: dict[str, Any] = {}
    for key in keys:
        if OmegaConf.is_missing(config, key):
            continue
        try:
            found[key] = what_counts(config[key])
        except Exception:
            found[key] = OmegaConf.to_container(config[key], resolve=False)
    if config.search.constraints:
        found["search.constraints"] = OmegaConf.to_container(config.search.constraints)
    loaded: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return loaded


def refuse_changed(folder: Path, lines: list[str]) -> UserError:
    """What to say of a sweep whose command has changed."""
    said = "; ".join(lines)
    return UserError(
        f"{folder} was begun with other settings: {said}; put them back, name another sweep with "
        "search.study=<name>, or set sweep.on_change=continue or sweep.on_change=new"
    )
