"""The study's database where this process is its only writer: what it wrote it need not read."""

import copy
import json
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
)
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import insert, update
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
    """A database of which trials under way are kept in memory, each replaced when it changes.

    Optuna reads a trial some ten times from its proposal to its end, each time all of its tables,
    and looks for it before each write. Here a write is one statement where it adds what is known
    not to be there; all else is left to Optuna.
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
        if session.held:
            yield
            return
        session.held = True
        try:
            yield
            session.held = False
            session.commit()
        except BaseException:
            self._under_way.clear()
            self._ids = None
            raise
        finally:
            session.held = False
            session.close()

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """A trial as it is."""
        if (trial := self._under_way.get(trial_id)) is None:
            trial = self._under_way[trial_id] = super().get_trial(trial_id)
        return trial

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
        begun = create_trial(state=TrialState.RUNNING) if template_trial is None else template_trial
        if self._ids is None or begun.state.is_finished() or begun.intermediate_values:
            created = super()._create_new_trial(study_id, template_trial)
        else:
            created = self._add_trial(study_id, begun, len(self._ids))
        if self._ids is not None:
            self._ids.append(created._trial_id)
        self._under_way[created._trial_id] = created
        return created

    def _add_trial(self, study_id: int, template: FrozenTrial, number: int) -> FrozenTrial:
        """A new trial under way, or waiting."""
        created = copy.deepcopy(template)
        created.number = number
        names = ("number", "state", "datetime_start")
        about = {name: getattr(created, name) for name in names}
        with self.at_once():
            created._trial_id = self._add(models.TrialModel, study_id=study_id, **about)
            for name, value in created.params.items():
                distribution = created.distributions[name]
                internal = distribution.to_internal_repr(value)
                self._add_param(created._trial_id, name, internal, distribution)
            for model, given in (
                (models.TrialUserAttributeModel, created.user_attrs),
                (models.TrialSystemAttributeModel, created.system_attrs),
            ):
                for key, value in given.items():
                    text = json.dumps(value)
                    self._add(model, trial_id=created._trial_id, key=key, value_json=text)
        return created

    def _set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
        previous_distribution: BaseDistribution | None,
    ) -> None:
        trial = self._running(trial_id)
        if trial is None or previous_distribution is None or param_name in trial.params:
            given = (param_name, param_value_internal, distribution, previous_distribution)
            super()._set_trial_param(trial_id, *given)
        else:
            check_distribution_compatibility(previous_distribution, distribution)
            self._add_param(trial_id, param_name, param_value_internal, distribution)
        value = distribution.to_external_repr(param_value_internal)
        self._put(trial_id, "params", param_name, value)
        self._put(trial_id, "distributions", param_name, distribution)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Set them, and when."""
        if (trial := self._running(trial_id)) is None or not state.is_finished():
            self._under_way.pop(trial_id, None)  # the time comes with them
            return super().set_trial_state_values(trial_id, state, values)
        ended = copy.copy(trial)
        ended.state, ended.datetime_complete = state, datetime.now()
        ended.values = None if values is None else [float(value) for value in values]
        changed = {"state": state, "datetime_complete": ended.datetime_complete}
        with self.at_once():
            for number, value in enumerate(ended.values or ()):
                stored, kind = models.TrialValueModel.value_to_stored_repr(value)
                about = {"objective": number, "value": stored, "value_type": kind}
                self._add(models.TrialValueModel, trial_id=trial_id, **about)
            this = models.TrialModel.trial_id == trial_id
            self.scoped_session().execute(update(models.TrialModel.__table__).where(this), changed)
        self._under_way[trial_id] = ended
        return True

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        """Set the value after a step."""
        super().set_trial_intermediate_value(trial_id, step, intermediate_value)
        self._put(trial_id, "intermediate_values", step, float(intermediate_value))

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set what the project notes."""
        trial, text = self._running(trial_id), json.dumps(value)
        if trial is None or key in trial.user_attrs:
            super().set_trial_user_attr(trial_id, key, value)
        else:
            model = models.TrialUserAttributeModel
            self._add(model, trial_id=trial_id, key=key, value_json=text)
        self._put(trial_id, "user_attrs", key, json.loads(text))

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set what Optuna notes."""
        super().set_trial_system_attr(trial_id, key, value)
        self._put(trial_id, "system_attrs", key, json.loads(json.dumps(value)))

    def _running(self, trial_id: int) -> FrozenTrial | None:
        """A trial that is in memory and may be changed."""
        trial = self._under_way.get(trial_id)
        return trial if trial is not None and trial.state is TrialState.RUNNING else None

    def _put(self, trial_id: int, name: str, key: str | int, value: Any) -> None:
        """Replace a trial in memory by one with an entry more; whoever has the old one keeps it."""
        if (trial := self._under_way.get(trial_id)) is not None:
            self._under_way[trial_id] = changed = copy.copy(trial)
            setattr(changed, name, {**getattr(trial, name), key: value})

    def _add_param(
        self, trial_id: int, name: str, internal: float, distribution: BaseDistribution
    ) -> None:
        about = {"param_name": name, "param_value": internal}
        text = distribution_to_json(distribution)
        self._add(models.TrialParamModel, trial_id=trial_id, distribution_json=text, **about)

    def _add(self, model: Any, **row: Any) -> int:
        """Add a row, and give its id."""
        with self.at_once():
            added: Any = self.scoped_session().execute(insert(model.__table__), row)
            return int(added.inserted_primary_key[0])
