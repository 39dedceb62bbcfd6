"""Checks before the first trial."""

from types import SimpleNamespace
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from stagesweep.base.errors import UserError
from stagesweep.config import register
from stagesweep.sweep.engine.setup import check_study_name, validate_sweep
from stagesweep.sweep.space.grammar import parse


def test_a_key_without_a_value_can_be_swept() -> None:
    given = ["experiment=audiogram", "data.path=a.csv,b.csv"]
    register.register()
    with initialize_config_dir(str(register.folder()), job_name="stagesweep"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("config", given, run_mode=RunMode.MULTIRUN)
        HydraConfig.instance().set_config(config)
        try:
            launcher: Any = SimpleNamespace()
            validate_sweep(config, parse({}, given), launcher, launcher)
        finally:
            HydraConfig.instance().cfg = None


def test_an_invalid_study_name_is_refused() -> None:
    for name in ("bayes_0a1b2c3d", "größe-2.1", "grid_1_2"):
        check_study_name(name)
    for name in ("../../x", "a/b", "..", "a..b", "/x", "", "a b", ".x", "a\\b", "a\n"):
        with pytest.raises(UserError, match="must be a name"):
            check_study_name(name)
