"""The study's database where this process is its only writer: what it wrote it need not read."""

import copy
import json
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.orm import Session, scoped_session, sessionmaker


class _Session(Session):
    """A session that outlasts the transactions of Optuna while it is held."""

    held = False

    def commit(self) -> None:
        self.flush() if self.held else super().commit()

    def close(self) -> None:
        if not self.held:
            super().close()


class OneWriter(RDBStorage):
    """A database of which trials under way are read from memory.

    Optuna reads a trial some ten times from its proposal to its end, each time all of its tables.
    What has ended is read once more.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.scoped_session = scoped_session(sessionmaker(self.engine, class_=_Session))
        # The trials under way, and the ids of all that are known to be there; None: none is read.
        self._under_way: dict[int, FrozenTrial] = {}
        self._ids: list[int] | None = None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A block whose writes reach the disk together, at its end, or none of them does.

        A commit costs as much as all the rest of a write, and a proposal is some five writes.
        """
        session = self.scoped_session()
        assert isinstance(session, _Session)
        session.held = True
        try:
            yield
            session.held = False
            session.commit()
        finally:
            session.held = False
            session.close()

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """A trial as it is."""
        if (trial := self._under_way.get(trial_id)) is None:
            trial = self._under_way[trial_id] = super().get_trial(trial_id)
        return copy.deepcopy(trial)

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        """The trials of those ids, and all that came later."""
        if self._ids is None or states is not None:
            given = (study_id, states, included_trial_ids, trial_id_greater_than)
            trials = super()._get_trials(*given)
            if states is None and not included_trial_ids and trial_id_greater_than < 0:
                self._ids = [trial._trial_id for trial in trials]
            return trials
        wanted = (n for n in self._ids if n > trial_id_greater_than or n in included_trial_ids)
        trials = [self.get_trial(n) for n in wanted]
        for trial in trials:
            if trial.state.is_finished():  # Optuna asks for it no more
                self._under_way.pop(trial._trial_id, None)
        return trials

    def _create_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None = None
    ) -> FrozenTrial:
        created = super()._create_new_trial(study_id, template_trial)
        if self._ids is not None:
            self._ids.append(created._trial_id)
        self._under_way[created._trial_id] = copy.deepcopy(created)
        return created

    def _set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
        previous_distribution: BaseDistribution | None,
    ) -> None:
        given = (param_name, param_value_internal, distribution, previous_distribution)
        super()._set_trial_param(trial_id, *given)
        if (trial := self._under_way.get(trial_id)) is not None:
            trial.distributions[param_name] = distribution
            trial.params[param_name] = distribution.to_external_repr(param_value_internal)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Set them; the time comes with them, so the next reader asks the database."""
        self._under_way.pop(trial_id, None)
        return super().set_trial_state_values(trial_id, state, values)

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        """Set the value after a step."""
        super().set_trial_intermediate_value(trial_id, step, intermediate_value)
        if (trial := self._under_way.get(trial_id)) is not None:
            trial.intermediate_values[step] = float(intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set what the project notes."""
        super().set_trial_user_attr(trial_id, key, value)
        if (trial := self._under_way.get(trial_id)) is not None:
            trial.user_attrs[key] = json.loads(json.dumps(value))

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set what Optuna notes."""
        super().set_trial_system_attr(trial_id, key, value)
        if (trial := self._under_way.get(trial_id)) is not None:
            trial.system_attrs[key] = json.loads(json.dumps(value))
