"""The SQLite database of a study, written by one process or opened to be read.

`benchmarks.storage` compares `SingleWriterStorage` with Optuna's own storages.
"""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import StorageInternalError
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.study import Study, StudyDirection, get_all_study_names, load_study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Engine, delete, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from stagesweep.base import compat
from stagesweep.base.errors import UserError
from stagesweep.sweep.study.url import without_password


def open_database(url: str, **options: Any) -> RDBStorage:
    """Optuna's storage of a URL. The path of an SQLite file may have any signs but ``?``.

    SQLAlchemy would decode ``%``, and Optuna would replace what is in braces.
    """
    path = url.removeprefix("sqlite:///")
    if path == url or "?" in path:
        return RDBStorage(url, engine_kwargs=options)
    connect = partial(sqlite3.connect, path, check_same_thread=False)
    return RDBStorage("sqlite:///study.db", engine_kwargs={"creator": connect, **options})


def read_only(file: Path) -> RDBStorage:
    """A storage that cannot change the file, nor create one."""
    uri = f"file:{quote(str(file.absolute()))}?mode=ro"
    connect = partial(sqlite3.connect, uri, uri=True, check_same_thread=False)
    return RDBStorage("sqlite:///study.db", engine_kwargs={"creator": connect})


def damaged(place: str, reason: str) -> UserError:
    """The error for a database that is not as Optuna writes it."""
    return UserError(
        f"{without_password(place)} cannot be read as an Optuna study: {reason}; put it back from "
        "a copy, or name another sweep with search.study=<name> (finished stages are not trained "
        "again)"
    )


@contextmanager
def study_read(place: str) -> Iterator[None]:
    """Context for reading a study; UserError for what a damaged row makes Optuna raise."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    except (LookupError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        line = str(error).partition("\n")[0]
        raise damaged(place, f"{type(error).__name__}: {line}") from error
    finally:
        optuna.logging.set_verbosity(verbosity)


def load_recorded(folder: Path, url: str | None) -> Study:
    """Load the study of the sweep in a folder: from its ``study.db``, or else from a URL.

    Raises UserError when there is none.
    """
    file = folder / "study.db"
    if not url and not file.exists():
        raise UserError(f"no study in {folder}; a sweep's folder holds a study.db")
    place = str(file) if url is None or file.exists() else url
    try:
        with study_read(place):
            storage = read_only(file) if place != url else open_database(place)
            names = get_all_study_names(storage)
            if folder.name in names or len(names) == 1:
                name = folder.name if folder.name in names else names[0]
                study = load_study(study_name=name, storage=storage)
                study.get_trials(deepcopy=False)  # of all rows, not only when they are needed
                return study
    except (SQLAlchemyError, StorageInternalError) as error:
        cause = error if isinstance(error, SQLAlchemyError) else error.__cause__
        raise damaged(place, str(cause or error).partition("\n")[0]) from error
    have = ", ".join(names) or "none"
    raise UserError(f"{without_password(place)} has no study '{folder.name}'; it has {have}")


def reopen_failed(engine: Engine, study_name: str) -> list[int]:
    """Make the failed trials of a study running ones again; returns their numbers.

    Optuna has no public way to change a trial that has ended. Open the study after this: a storage
    keeps ended trials in memory.
    """
    tables = compat.optuna_tables()
    trials, attributes = tables.TrialModel, tables.TrialUserAttributeModel
    system = tables.TrialSystemAttributeModel
    studies = tables.StudyModel
    failed = (
        select(trials.trial_id, trials.number)
        .join(studies, studies.study_id == trials.study_id)
        .where(studies.study_name == study_name, trials.state == TrialState.FAIL)
        .order_by(trials.number)
    )
    with engine.begin() as connection:
        found = connection.execute(failed).all()
        for key, _ in found:
            connection.execute(
                update(trials)
                .where(trials.trial_id == key)
                .values(state=TrialState.RUNNING, datetime_complete=None)
            )
            of_its_end = (attributes.trial_id == key) & (attributes.key != "overrides")
            connection.execute(delete(attributes).where(of_its_end))
            bounds = (system.trial_id == key) & system.key.startswith("constraint")
            connection.execute(delete(system).where(bounds))
    return [number for _, number in found]


class SingleWriterStorage(InMemoryStorage):
    """A study in memory whose changes are written to Optuna's SQLite database.

    Reads do not touch the disk. A write is one SQL statement, and a `transaction` groups several.
    Optuna's `RDBStorage` creates and loads the database, so that any tool for Optuna can read it.
    Only one process at a time may open a study in this way, and only one study in each storage.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self.database = open_database(url)
        self._tables = compat.optuna_tables()
        self._connection: Connection | None = None
        self._study_name: str | None = None
        # Primary keys in the database: of the study, and of each trial by its id in memory.
        self._study_key = 0
        self._trial_keys: list[int] = []

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Write all changes of the block together at its end, or none of them after an error.

        Blocks can be nested. After an error, memory is loaded again from the database.
        """
        if self._connection is not None:
            yield self._connection
            return
        try:
            with self.database.engine.begin() as self._connection:
                yield self._connection
        except BaseException:
            if self._study_name is not None:
                self._load(self._study_name)
            raise
        finally:
            self._connection = None

    def _load(self, study_name: str) -> None:
        """Load a study of the database into memory."""
        key = self._study_key = self.database.get_study_id_from_name(study_name)
        super().__init__()
        study_id = super().create_new_study(self.database.get_study_directions(key), study_name)
        for name, value in self.database.get_study_user_attrs(key).items():
            super().set_study_user_attr(study_id, name, value)
        for name, value in self.database.get_study_system_attrs(key).items():
            super().set_study_system_attr(study_id, name, value)
        for trial in self.database.get_all_trials(key, deepcopy=False):
            super().create_new_trial(study_id, trial)
        trials = self._tables.TrialModel
        keys = select(trials.trial_id).where(trials.study_id == key).order_by(trials.number)
        with self.database.engine.connect() as connection:
            self._trial_keys = list(connection.scalars(keys))
        self._study_name = study_name

    # ------------------------------------------------------------------ the study

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        """Create the study. Raises DuplicatedStudyError when the database has it."""
        key = self.database.create_new_study(directions, study_name)
        return self.get_study_id_from_name(self.database.get_study_name_from_id(key))

    def get_study_id_from_name(self, study_name: str) -> int:
        """Return the id of the study, loaded when it is not in memory yet."""
        if self._study_name is None:
            self._load(study_name)
        return super().get_study_id_from_name(study_name)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """Set a user attribute of the study."""
        text = json.dumps(value)
        row = {"study_id": self._study_key, "key": key, "value_json": text}
        with self.transaction():
            super().set_study_user_attr(study_id, key, json.loads(text))
            self._write(self._tables.StudyUserAttributeModel, **row)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """Set an attribute of the study that Optuna keeps."""
        text = json.dumps(value)
        row = {"study_id": self._study_key, "key": key, "value_json": text}
        with self.transaction():
            super().set_study_system_attr(study_id, key, json.loads(text))
            self._write(self._tables.StudySystemAttributeModel, **row)

    # ------------------------------------------------------------------ trials

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Create a trial, with everything that a template has."""
        with self.transaction():
            trial_id = super().create_new_trial(study_id, template_trial)
            trial = self.get_trial(trial_id)
            row = {"study_id": self._study_key, "number": trial.number, **_state(trial)}
            self._trial_keys.append(self._write(self._tables.TrialModel, **row))
            for name in trial.params:
                self._write_param(trial_id, name)
            for name in trial.user_attrs:
                self._write_user_attr(trial_id, name)
            for name in trial.system_attrs:
                self._write_system_attr(trial_id, name)
            for step in trial.intermediate_values:
                self._write_intermediate_value(trial_id, step)
            self._write_values(trial_id)
        return trial_id

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        """Set a parameter."""
        with self.transaction():
            super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
            self._write_param(trial_id, param_name)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Set the state and the objectives. False when the trial is running already."""
        floats = None if values is None else [float(value) for value in values]
        with self.transaction() as connection:
            if not super().set_trial_state_values(trial_id, state, floats):
                return False
            trials = self._tables.TrialModel
            this = update(trials.__table__).where(trials.trial_id == self._trial_keys[trial_id])
            connection.execute(this, _state(self.get_trial(trial_id)))
            self._write_values(trial_id)
        return True

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        """Set the value after a step."""
        with self.transaction():
            super().set_trial_intermediate_value(trial_id, step, float(intermediate_value))
            self._write_intermediate_value(trial_id, step)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a user attribute of a trial."""
        with self.transaction():
            super().set_trial_user_attr(trial_id, key, json.loads(json.dumps(value)))
            self._write_user_attr(trial_id, key)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set an attribute of a trial that Optuna keeps."""
        with self.transaction():
            super().set_trial_system_attr(trial_id, key, json.loads(json.dumps(value)))
            self._write_system_attr(trial_id, key)

    # ------------------------------------------------------------------ rows

    def _write(self, table: Any, **row: Any) -> int:
        """Insert a row, or replace the one with the same unique columns. Returns its key."""
        statement = insert(table.__table__).prefix_with("OR REPLACE")
        with self.transaction() as connection:
            written: Any = connection.execute(statement, row)
            return int(written.inserted_primary_key[0])

    def _write_param(self, trial_id: int, name: str) -> None:
        trial = self.get_trial(trial_id)
        distribution = trial.distributions[name]
        self._write(
            self._tables.TrialParamModel,
            trial_id=self._trial_keys[trial_id],
            param_name=name,
            param_value=distribution.to_internal_repr(trial.params[name]),
            distribution_json=distribution_to_json(distribution),
        )

    def _write_user_attr(self, trial_id: int, key: str) -> None:
        text = json.dumps(self.get_trial(trial_id).user_attrs[key])
        row = {"trial_id": self._trial_keys[trial_id], "key": key, "value_json": text}
        self._write(self._tables.TrialUserAttributeModel, **row)

    def _write_system_attr(self, trial_id: int, key: str) -> None:
        text = json.dumps(self.get_trial(trial_id).system_attrs[key])
        row = {"trial_id": self._trial_keys[trial_id], "key": key, "value_json": text}
        self._write(self._tables.TrialSystemAttributeModel, **row)

    def _write_intermediate_value(self, trial_id: int, step: int) -> None:
        table = self._tables.TrialIntermediateValueModel
        value = self.get_trial(trial_id).intermediate_values[step]
        stored, kind = table.intermediate_value_to_stored_repr(value)
        row = {"intermediate_value": stored, "intermediate_value_type": kind}
        self._write(table, trial_id=self._trial_keys[trial_id], step=step, **row)

    def _write_values(self, trial_id: int) -> None:
        table = self._tables.TrialValueModel
        for objective, value in enumerate(self.get_trial(trial_id).values or ()):
            stored, kind = table.value_to_stored_repr(value)
            row = {"objective": objective, "value": stored, "value_type": kind}
            self._write(table, trial_id=self._trial_keys[trial_id], **row)


def _state(trial: FrozenTrial) -> dict[str, Any]:
    """The state and the times of a trial as columns."""
    return {
        "state": trial.state,
        "datetime_start": _utc(trial.datetime_start),
        "datetime_complete": _utc(trial.datetime_complete),
    }


def _utc(time: datetime | None) -> datetime | None:
    """A local time as Optuna stores it: in UTC, and without a time zone."""
    return None if time is None else time.astimezone(UTC).replace(tzinfo=None)
