"""The controller has the settings of the trials, whatever is swept."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from stagesweep.base.errors import UserError
from stagesweep.config import register
from stagesweep.sweep.engine.shared_settings import share
from stagesweep.sweep.space.grammar import parse

Read = Callable[..., DictConfig]

HEAD = "# @package _global_\ndefaults: [digits, _self_]\n"
EXPERIMENTS = {
    "loss": HEAD + "objective: {metric: joint/val_loss, mode: min}\n",
    "loss_too": HEAD + "objective: {metric: joint/val_loss, mode: min}\nsearch: {repeats: 1}\n",
    "repeats": HEAD + "search: {repeats: 3}\n",
    "slots": HEAD + "hydra: {launcher: {slots: 3}}\n",
}


@pytest.fixture
def read(tmp_path: Path) -> Iterator[Read]:
    """The config of a sweep, with the settings of its trials."""
    register.register()
    (tmp_path / "experiment").mkdir()
    for name, text in EXPERIMENTS.items():
        (tmp_path / "experiment" / f"{name}.yaml").write_text(text)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(register.folder()), job_name="stagesweep"):
        loader = GlobalHydra.instance().config_loader()
        launcher: Any = SimpleNamespace(hydra_context=SimpleNamespace(config_loader=loader))

        def shared(*arguments: str, **more: Any) -> DictConfig:
            given = [f"hydra.searchpath=[{tmp_path.as_uri()}]", "search.study=s", *arguments]
            config = loader.load_configuration("config", given, run_mode=RunMode.MULTIRUN)
            HydraConfig.instance().set_config(config)
            share(config, parse({}, arguments, **more), launcher)
            return config

        yield shared
    HydraConfig.instance().cfg = None


def test_the_objective_is_that_of_the_swept_experiments(read: Read) -> None:
    config = read("experiment=loss,loss_too")
    assert config.objective == {"metric": "joint/val_loss", "mode": "min"}


REFUSED = {
    "objective": (
        ("experiment=digits,loss",),
        "trials of one sweep share objective: experiment=digits has evaluate/val_nmi (max), "
        "experiment=loss has joint/val_loss (min); set objective for all, or sweep them one by one",
    ),
    "repeats": (
        ("experiment=digits,repeats",),
        "trials of one sweep share search.repeats: experiment=digits has 1, experiment=repeats ",
    ),
    "pruner by its group": (
        ("search/pruner=median,asha",),
        "trials of one sweep share search.pruner: search/pruner=median has {'_target_': ",
    ),
    "launcher": (
        ("experiment=digits,slots",),
        "experiment=slots: 'hydra.launcher' must be configured before the sweep starts",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_trials_that_differ_in_settings_of_the_controller_are_refused(
    read: Read, case: str
) -> None:
    arguments, line = REFUSED[case]
    with pytest.raises(UserError) as caught:
        read(*arguments)
    assert str(caught.value).startswith(line)


def test_variants_of_an_ablation_share_settings(read: Read) -> None:
    with pytest.raises(UserError, match="share objective: ablation=full has "):
        read(variants={"other": ["objective.mode=min"]})
