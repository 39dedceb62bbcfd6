"""Checks before the first trial."""

from types import SimpleNamespace
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from stagesweep.base.errors import UserError
from stagesweep.config import register
from stagesweep.sweep.engine.setup import (
    check_study_name,
    is_missing,
    is_unknown_key,
    validate_sweep,
)
from stagesweep.sweep.space.grammar import parse


@pytest.mark.parametrize(
    "given",
    [
        ["experiment=audiogram", "data.path=a.csv,b.csv"],
        # A relative interpolation means nothing in the list of typed overrides.
        ["experiment=audiogram", "data.path=a.csv,b.csv", "stage.joint.epochs=${.batch_size}"],
    ],
)
def test_a_key_without_a_value_can_be_swept(given: list[str]) -> None:
    register.register()
    with initialize_config_dir(str(register.folder()), job_name="stagesweep"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("config", given, run_mode=RunMode.MULTIRUN)
        assert is_missing(config, "data.path")
        HydraConfig.instance().set_config(config)
        try:
            launcher: Any = SimpleNamespace()
            validate_sweep(config, parse({}, given), launcher, launcher)
        finally:
            HydraConfig.instance().cfg = None


def test_keys_are_found_without_resolving_any() -> None:
    config = OmegaConf.create({"a": {"b": "???", "c": "${.x}"}, "d": "${e}", "f": "???"})
    assert [is_missing(config, key) for key in ("a.b", "f")] == [True, True]
    assert not any(is_missing(config, key) for key in ("a.c", "a.x", "d", "d.e", "g.h"))
    assert [is_unknown_key(config, key) for key in ("a.b", "a.x", "d.e")] == [False, True, False]


def test_an_invalid_study_name_is_refused() -> None:
    for name in ("bayes_0a1b2c3d", "größe-2.1", "grid_1_2"):
        check_study_name(name)
    for name in ("../../x", "a/b", "..", "a..b", "/x", "", "a b", ".x", "a\\b", "a\n"):
        with pytest.raises(UserError, match="must be a name"):
            check_study_name(name)
