"""A study in memory equals the study on disk, and a killed writer leaves one that opens."""

import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from stagesweep.base.errors import UserError
from stagesweep.sweep.study.controllers import storage_errors
from stagesweep.sweep.study.storage import (
    SingleWriterStorage,
    load_recorded,
    open_database,
    read_only,
    study_read,
)


def same(study: optuna.Study, url: str) -> list[FrozenTrial]:
    """The trials in memory, which equal those that another process reads."""
    other = optuna.load_study(study_name="s", storage=url)
    seen = study.get_trials()
    # Ids differ: those of the database count from 1, and are not in the text of a trial.
    assert [repr(t) for t in map(plain, seen)] == [repr(t) for t in map(plain, other.get_trials())]
    return seen


def plain(trial: FrozenTrial) -> dict[str, object]:
    """The content of a trial, without its id in the storage."""
    names = "number state values datetime_start datetime_complete constraints params distributions"
    names += " user_attrs system_attrs intermediate_values"
    found = {name: getattr(trial, name) for name in names.split()}
    return {k: dict(sorted(v.items())) if isinstance(v, dict) else v for k, v in found.items()}


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "a{b} c,ü#%20=&[x]"
    folder.mkdir()
    open_database(f"sqlite:///{folder / 'study.db'}")
    assert [path.name for path in folder.iterdir()] == ["study.db"]


def test_memory_and_disk_agree_after_every_write(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=1, multivariate=True)
    study = optuna.create_study(study_name="s", storage=SingleWriterStorage(url), sampler=sampler)
    for number in range(4):
        if number == 2:
            study.enqueue_trial({"x": 0.5})
            assert same(study, url)[2].state.name == "WAITING"
        trial = study.ask()
        assert same(study, url)[number].state.name == "RUNNING"
        trial.suggest_float("x", 0, 1)
        trial.suggest_categorical("c", ["a", "b"])
        trial.report(0.25, 1)
        trial.set_user_attr("overrides", ("x=1", "c=a"))
        assert same(study, url)[number].user_attrs == {"overrides": ["x=1", "c=a"]}
        if number != 1:  # one is still running
            study.tell(trial, float(number))
            assert same(study, url)[number].value == number
    again = optuna.load_study(study_name="s", storage=SingleWriterStorage(url))
    assert [trial.state.name for trial in same(again, url)] == ["COMPLETE", "RUNNING"] + [
        "COMPLETE"
    ] * 2
    again.tell(1, state=optuna.trial.TrialState.FAIL)
    assert same(again, url)[1].state.name == "FAIL"


def test_a_block_is_written_at_once_or_not_at_all(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    storage = SingleWriterStorage(url)
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(study_name="s", storage=storage, sampler=sampler)
    other = optuna.load_study(study_name="s", storage=url)
    with storage.transaction():
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        trial.set_user_attr("overrides", ["x=1"])
        assert other.get_trials() == []
        assert study.trials[0].user_attrs == {"overrides": ["x=1"]}
    assert same(study, url)[0].params == trial.params
    with storage.transaction():
        trial.set_user_attr("reason", "nan")
        study.tell(trial, 2.0)
        assert other.get_trials()[0].state.name == "RUNNING"
    assert same(study, url)[0].value == 2.0

    def interrupted() -> None:
        with storage.transaction():
            study.ask()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(other.get_trials()) == 1
    # Later writes are immediate.
    again = optuna.create_study(
        study_name="s", storage=SingleWriterStorage(url), load_if_exists=True
    )
    again.ask()
    assert len(same(again, url)) == 2


def test_a_given_point_and_its_end_are_stored(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    storage = SingleWriterStorage(url)
    study = optuna.create_study(study_name="s", storage=storage, directions=["minimize"] * 2)
    space: dict[str, optuna.distributions.BaseDistribution] = {
        "x": optuna.distributions.FloatDistribution(0, 1),
        "c": optuna.distributions.CategoricalDistribution(["a", None]),
    }
    given: dict[str, Any] = {"params": {"x": 0.5, "c": None}, "distributions": space}
    for number in range(2):
        assert len(same(study, url)) == number
        notes = {"overrides": [f"x={number}"]}
        template = optuna.create_trial(state=TrialState.RUNNING, user_attrs=notes, **given)
        study.add_trial(template)
    before = study.get_trials(deepcopy=False)[1]
    ids = [storage.get_trial_id_from_study_id_trial_number(0, number) for number in range(2)]
    storage.set_trial_user_attr(ids[1], "overrides", ["x=2"])
    storage.set_trial_user_attr(ids[1], "seconds", 2.5)
    assert before.user_attrs == {"overrides": ["x=1"]}  # whoever has it keeps it
    assert same(study, url)[1].user_attrs == {"overrides": ["x=2"], "seconds": 2.5}
    study.tell(0, [1, float("-inf")])
    study.tell(1, state=TrialState.PRUNED)
    ended = same(study, url)
    assert [trial.state.name for trial in ended] == ["COMPLETE", "PRUNED"]
    assert ended[0].values == [1.0, float("-inf")]
    assert ended[0].params == {"x": 0.5, "c": None}
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        storage.set_trial_user_attr(ids[0], "seconds", 1.0)


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo"])
def test_times_are_stored_as_optuna_stores_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zone: str
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        url = f"sqlite:///{tmp_path / 'study.db'}"
        study = optuna.create_study(study_name="s", storage=SingleWriterStorage(url))
        study.ask()
        study.tell(0, 1.0)
        same(study, url)
    finally:
        monkeypatch.undo()
        time.tzset()


def write_for_ever(url: str, ready: str) -> None:
    storage = SingleWriterStorage(url)
    study = optuna.create_study(study_name="s", storage=storage, load_if_exists=True)
    while True:
        with storage.transaction():
            trial = study.ask()
            trial.suggest_float("x", 0, 1)
            trial.set_user_attr("overrides", ["x=1"])
        with storage.transaction():
            trial.set_user_attr("seconds", 1.0)
            study.tell(trial, 1.0)
        Path(ready).touch()


def test_a_study_opens_after_its_writer_was_killed(tmp_path: Path) -> None:
    url, known = f"sqlite:///{tmp_path / 'study.db'}", 0
    for attempt in range(4):
        ready = tmp_path / f"ready{attempt}"
        writer = get_context("fork").Process(target=write_for_ever, args=(url, str(ready)))
        writer.start()
        while not ready.exists():
            assert writer.is_alive()
            time.sleep(0.01)
        time.sleep(0.05 + 0.037 * attempt)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        study = optuna.load_study(study_name="s", storage=SingleWriterStorage(url))
        trials = same(study, url)
        assert len(trials) > known
        known = len(trials)
        assert [trial.number for trial in trials] == list(range(known))
        for trial in trials:  # a proposal and an end are whole
            assert trial.user_attrs["overrides"] == ["x=1"]
            assert ("seconds" in trial.user_attrs) == (trial.state is TrialState.COMPLETE)


def test_attributes_of_the_study_are_on_disk(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.create_study(study_name="s", storage=SingleWriterStorage(url))
    for value in (1, (2, 3)):
        study.set_user_attr("a", value)
        assert study.user_attrs == optuna.load_study(study_name="s", storage=url).user_attrs
    again = optuna.load_study(study_name="s", storage=SingleWriterStorage(url))
    assert again.user_attrs == {"a": [2, 3]}


def test_a_read_only_storage_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    study = optuna.create_study(study_name="s", storage=SingleWriterStorage(f"sqlite:///{file}"))
    study.ask()
    before = file.read_bytes()
    opened = optuna.load_study(study_name="s", storage=read_only(file))
    assert len(opened.trials) == 1
    with pytest.raises(optuna.exceptions.StorageInternalError):
        opened.ask()
    assert file.read_bytes() == before


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "no database": lambda content: b"no database" * 100,
    "direction": lambda content: content.replace(b"MINIMIZE", b"MINIMISE"),
    "distribution": lambda content: content.replace(b'"low"', b'"lOw"'),
    "text": lambda content: content.replace(b'{"name": "Float', b'\xff"name": "Float'),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_database_is_named_with_the_remedy(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file, url = tmp_path / "study.db", f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.create_study(study_name="s", storage=SingleWriterStorage(url))
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    study.tell(trial, 1.0)
    study._storage.database.engine.dispose()  # type: ignore[attr-defined]
    file.write_bytes(DAMAGE[kind](file.read_bytes()))
    line = r"study\.db cannot be read as an Optuna study: .*; put it back .* search\.study=<name>"
    with pytest.raises(UserError, match=line) as error, storage_errors(url), study_read(url):
        optuna.create_study(study_name="s", storage=SingleWriterStorage(url), load_if_exists=True)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""
    with pytest.raises(UserError, match=line):
        load_recorded(tmp_path, None)
