"""What is read from memory is what is on disk."""

from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from stagesweep.sweep.study.storage import OneWriter


def same(study: optuna.Study, url: str) -> list[FrozenTrial]:
    """The trials as this process sees them; another one sees the same."""
    other = optuna.load_study(study_name="s", storage=url)
    seen = study.get_trials()
    assert seen == other.get_trials()
    assert [study._storage.get_trial(t._trial_id) for t in seen] == seen
    return seen


def test_memory_and_disk_agree_after_every_write(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=1, multivariate=True)
    study = optuna.create_study(study_name="s", storage=OneWriter(url), sampler=sampler)
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
        if number != 1:  # one stays under way
            study.tell(trial, float(number))
            assert same(study, url)[number].value == number
    again = optuna.load_study(study_name="s", storage=OneWriter(url))
    assert [trial.state.name for trial in same(again, url)] == ["COMPLETE", "RUNNING"] + [
        "COMPLETE"
    ] * 2
    again.tell(1, state=optuna.trial.TrialState.FAIL)
    assert same(again, url)[1].state.name == "FAIL"


def test_a_block_is_written_at_once_or_not_at_all(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    storage = OneWriter(url)
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(study_name="s", storage=storage, sampler=sampler)
    other = optuna.load_study(study_name="s", storage=url)
    with storage.at_once():
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        trial.set_user_attr("overrides", ["x=1"])
        assert other.get_trials() == []
        assert study.trials[0].user_attrs == {"overrides": ["x=1"]}
    assert same(study, url)[0].params == trial.params
    with storage.at_once():
        trial.set_user_attr("reason", "nan")
        study.tell(trial, 2.0)
        assert other.get_trials()[0].state.name == "RUNNING"
    assert same(study, url)[0].value == 2.0

    def interrupted() -> None:
        with storage.at_once():
            study.ask()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(other.get_trials()) == 1
    # Nothing is held back after it.
    again = optuna.create_study(study_name="s", storage=OneWriter(url), load_if_exists=True)
    again.ask()
    assert len(same(again, url)) == 2


def test_a_known_point_and_its_end(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    storage = OneWriter(url)
    study = optuna.create_study(study_name="s", storage=storage, directions=["minimize"] * 2)
    space: dict[str, optuna.distributions.BaseDistribution] = {
        "x": optuna.distributions.FloatDistribution(0, 1),
        "c": optuna.distributions.CategoricalDistribution(["a", None]),
    }
    given = {"params": {"x": 0.5, "c": None}, "distributions": space}
    for number in range(2):
        assert len(same(study, url)) == number
        notes = {"overrides": [f"x={number}"]}
        template = optuna.create_trial(state=TrialState.RUNNING, user_attrs=notes, **given)
        storage.create_new_trial(study._study_id, template)
    before = study.get_trials(deepcopy=False)[1]
    storage.set_trial_user_attr(before._trial_id, "overrides", ["x=2"])
    storage.set_trial_user_attr(before._trial_id, "seconds", 2.5)
    assert before.user_attrs == {"overrides": ["x=1"]}  # whoever has it keeps it
    assert same(study, url)[1].user_attrs == {"overrides": ["x=2"], "seconds": 2.5}
    study.tell(0, [1, float("-inf")])
    study.tell(1, state=TrialState.PRUNED)
    ended = same(study, url)
    assert [trial.state.name for trial in ended] == ["COMPLETE", "PRUNED"]
    assert ended[0].values == [1.0, float("-inf")]
    assert ended[0].params == {"x": 0.5, "c": None}
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        storage.set_trial_user_attr(ended[0]._trial_id, "seconds", 1.0)
